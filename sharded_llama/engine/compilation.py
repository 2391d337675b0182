"""Compiling once: the cache of executables on disk, and a counter that shows when something was compiled after all."""

import os
from pathlib import Path

import jax

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def use_compilation_cache() -> None:
    """Keeps executables in the user's cache folder, so that the next start need not compile them.

    JAX's own setting (JAX_COMPILATION_CACHE_DIR) wins; JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "sharded_llama" / "xla"))
        # Every step counts: by default JAX leaves out what compiles in less than a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class CompileCounter:
    """Counts what XLA is asked to compile in this process from now on; what comes from the disk counts as well."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: object) -> None:
        if event == COMPILE_EVENT:
            self.count += 1
