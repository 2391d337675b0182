"""Starts a peer in a process of its own, which has the accelerator for itself."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import EngineError
from ...json_file import read_json_object

SECONDS = 7200  # after which a peer is given up


def run_peer(job: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of `job` (see `peers.__main__`) with the peer's times. Raises EngineError when the process fails."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "job.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", __package__, str(asked), str(answered)]
        _run(command, f"--peer={job['peer']}")
        rows: Sequence[dict[str, Any]] = read_json_object(answered, EngineError)["rows"]
    return list(rows)


def _run(command: Sequence[str], what: str) -> None:
    try:
        status = subprocess.run(command, check=False, timeout=SECONDS).returncode
    except subprocess.TimeoutExpired:
        raise EngineError(f"{what}: given up after {SECONDS} seconds.") from None
    if status:
        raise EngineError(f"{what}: its process ended with status {status}; its messages are above.")
