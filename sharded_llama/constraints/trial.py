"""A bound on the time and memory that compiling a grammar takes, which the library's own limits do not give.

Terms that meet, as in `allOf` or Lark's `&` and `~`, can take time that grows exponentially, and a thread cannot be
stopped. So every grammar is compiled in a process of its own first, with a tokenizer of single bytes.
"""

import contextlib
import json
import select
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from ..errors import RequestError

SECONDS = 5.0
BYTES = 2 << 30
PROBED = 16  # tokens of an answer


class GrammarTrial:
    """A process that is started when it is needed first, or after it had to be stopped. Used by several threads."""

    def __init__(self, limits: dict[str, Any]):
        self._limits = limits
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def run(self, definition: str, form: str) -> None:
        """Raises RequestError if compiling the definition takes too long or too much memory; says no more of it."""
        with self._lock:
            process = self._running()
            try:
                process.stdin.write(json.dumps(definition) + "\n")
                process.stdin.flush()
                done = bool(select.select([process.stdout], [], [], SECONDS)[0])
            except OSError:  # it has ended
                done = True
            if done and process.stdout.readline():
                return
            self._stop()
        what = f"in {BYTES >> 30} GiB of memory" if done else f"in {SECONDS:g} s"
        raise RequestError(f"structured_outputs.{form} cannot be compiled {what}: make it simpler.")

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        if self._process is None:
            script = Path(__file__).with_name("trial_process.py")
            self._process = subprocess.Popen(
                [sys.executable, str(script), json.dumps(self._limits), str(BYTES), str(PROBED)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._end = weakref.finalize(self, _end, self._process)
        return self._process

    def _stop(self) -> None:
        self._process = None
        self._end()


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # for what was not written
            pipe.close()
