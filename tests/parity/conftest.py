"""Lets these tests import the checkpoints that the tests of the readers make, whichever folder is collected."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))
