"""What counts as a number in what a request says: Python's and NumPy's, but no truth values, and none beyond floats."""

import math
from typing import Any

import numpy as np


def is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    try:
        return (is_integer(value) or isinstance(value, (float, np.floating))) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False
