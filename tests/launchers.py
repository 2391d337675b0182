"""Launchers in processes of their own, which start at once: forked from one that has imported what they all need.

A fork differs from `python -m launch.NAME` in how it starts alone. Each launcher has a test that does without.
"""

import atexit
import importlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Collection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from compiler import UNOPTIMISED

ROOT = Path(__file__).parent.parent

FORKS = multiprocessing.get_context("forkserver")
# Nothing of what imports huggingface_hub, which reads its environment when it is imported.
FORKS.set_forkserver_preload(["launch.common", "launch.sampling_flags", "sharded_llama.checkpoint.hub"])


class Finished(NamedTuple):
    """What a process left, as in subprocess.CompletedProcess."""

    returncode: int  # negative: the signal that ended it
    stdout: str
    stderr: str


class Launched(NamedTuple):
    """A launcher that runs."""

    process: BaseProcess
    streams: tempfile.TemporaryDirectory[str]

    def finish(self, timeout: float = 240) -> Finished:
        """Waits for its end; after `timeout` seconds it is killed, as a hung collective ignores SIGTERM."""
        with self.streams as folder:
            self.process.join(timeout)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
            out, err = (Path(folder, name).read_text(encoding="utf-8") for name in ("out", "err"))
            return Finished(self.process.exitcode, out, err)


def start(launcher: str, *flags: object, stdin: str = "", without: Collection[str] = ()) -> Launched:
    """Starts launch/`launcher`.py in the repository's root, with this environment but for the variables `without`."""
    streams = tempfile.TemporaryDirectory()
    for name, text in (("in", stdin), ("out", ""), ("err", "")):
        Path(streams.name, name).write_text(text, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in without}
    process = FORKS.Process(target=_run, args=(launcher, [*map(str, flags)], environment, streams.name), daemon=True)
    process.start()
    return Launched(process, streams)


def run(launcher: str, *flags: object, stdin: str = "", without: Collection[str] = ()) -> Finished:
    """Starts a launcher and waits for its end."""
    return start(launcher, *flags, stdin=stdin, without=without).finish()


def _run(launcher: str, flags: list[str], environment: dict[str, str], folder: str) -> None:
    for number, name, mode in ((0, "in", os.O_RDONLY), (1, "out", os.O_WRONLY), (2, "err", os.O_WRONLY)):
        file = os.open(Path(folder, name), mode)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # multiprocessing has closed it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    import jax

    jax.config.update(UNOPTIMISED, environment.get(UNOPTIMISED.upper()) == "1")  # it was read at the import
    sys.argv = [f"launch/{launcher}.py", *flags]
    try:
        importlib.import_module(f"launch.{launcher}").cli()
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out: processes of a run take leave of one another
