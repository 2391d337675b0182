"""How the programs of a test are compiled: with LLVM's optimisations, or quickly."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

UNOPTIMISED = "jax_disable_most_optimizations"
OLDER_EMITTERS = ("xla_cpu_use_fusion_emitters", False)


def compile_unoptimised_sooner() -> None:
    """Lets XLA's older code generator make the unoptimised programs of this process, in half of the time."""
    import jax
    from jax._src import compiler  # nothing public sets an option for some of a process's programs

    get_compile_options = compiler.get_compile_options

    def with_older_emitters(*args: Any, **kwargs: Any) -> Any:
        options = get_compile_options(*args, **kwargs)
        if jax.config.read(UNOPTIMISED):
            options.env_option_overrides = [*options.env_option_overrides, OLDER_EMITTERS]
        return options

    compiler.get_compile_options = with_older_emitters


@contextlib.contextmanager
def compiling(optimised: bool) -> Iterator[None]:
    """Programs are compiled with or without optimisation, here and in processes that are started.

    What was compiled is not left to others, nor taken from them: JAX's caches on disk know the difference, those in
    memory do not.
    """
    import jax  # which reads the environment that conftest.py sets

    before = jax.config.read(UNOPTIMISED)
    if before != optimised:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(UNOPTIMISED.upper(), str(int(not optimised)))
        jax.clear_caches()
        jax.config.update(UNOPTIMISED, not optimised)
        try:
            yield
        finally:
            jax.config.update(UNOPTIMISED, before)
            jax.clear_caches()
