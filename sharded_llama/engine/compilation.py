"""What a start costs: executables kept on disk, what is compiled after all, and where the seconds go."""

import contextlib
import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import logging
from tqdm import tqdm

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"
COMPILE_THREADS = "compile"  # how the names of the threads begin in which a runner compiles ahead


def use_compilation_cache() -> None:
    """Keeps executables in the user's cache folder, so that the next start need not compile them.

    JAX keeps there, too, which variant of each of a GPU's operations XLA has measured to be the fastest
    (jax_persistent_cache_enable_xla_caches), so that a new shape measures only what is new in it.

    JAX's own setting (JAX_COMPILATION_CACHE_DIR) wins; JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "sharded_llama" / "xla"))
        # Every step counts: by default JAX leaves out what compiles in less than a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Tracing steps makes millions of objects that stay; to look for cycles among them again and again costs a sixth of
    a start from the disk cache."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def left_out_of_garbage_collection() -> Iterator[None]:
    """What exists now is not gone through in search of cycles. Of what was traced and compiled there is so much that a
    collection would hold up every answer for 40 ms. Where somebody has done the same already it is theirs to undo."""
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class CompileCounter:
    """Counts what XLA is asked to compile in this process from now on; what comes from the disk counts as well.

    As a context manager it counts until its end.
    """

    def __init__(self, threads: str = "") -> None:
        """threads: how the names begin of the threads whose compilations count; default: all."""
        self.count = 0
        self.cached = 0  # of `count`: those that came from the disk
        self._threads, self._lock = threads, threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._count)
        jax.monitoring.register_event_listener(self._count_cached)

    def __enter__(self) -> "CompileCounter":
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._count)
        jax.monitoring.unregister_event_listener(self._count_cached)

    def _count(self, event: str, duration: float, **_: object) -> None:
        if event == COMPILE_EVENT and self._is_of_interest():
            with self._lock:
                self.count += 1

    def _count_cached(self, event: str, **_: object) -> None:
        if event == CACHE_HIT_EVENT and self._is_of_interest():
            with self._lock:
                self.cached += 1

    def _is_of_interest(self) -> bool:
        return threading.current_thread().name.startswith(self._threads)


class Phases(dict[str, float]):
    """Seconds of a start by phase, one after the other in the order in which they came.

    Beside these, what went on at the same time: `weights_s`, seconds of reading weights, and the executables that
    were compiled, with how many of them came from the disk.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights_s = 0.0
        self.n_compiled = 0
        self.n_cached = 0

    @property
    def total_s(self) -> float:
        return sum(self.values())

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Adds what the block takes to a phase, and logs it."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self[name] = self.get(name, 0.0) + seconds
            tell("%s: %.1f s", name, seconds)

    def line(self) -> str:
        """All of it, for people: "ready after 9.1 s: config 0.9, memory plan 1.2, compile 6.5 (...), ..."."""
        notes = {
            COMPILING: f" ({self.n_compiled} executables, {self.n_cached} from the cache)",
            WAITING: f" (read in {self.weights_s:.1f} meanwhile)",
        }
        parts = [f"{name} {seconds:.1f}{notes.get(name, '')}" for name, seconds in self.items()]
        return f"ready after {self.total_s:.1f} s: {', '.join(parts)}"


OPENING, PLANNING, COMPILING, WAITING, PAGES = "config", "memory plan", "compile", "waiting for weights", "pages"


def tell(message: str, *args: object) -> None:
    """Logs while other threads may show progress bars, which are drawn again below."""
    with tqdm.external_write_mode():
        logging.info(message, *args)
