"""How the programs of a test are compiled: with LLVM's optimisations, or quickly."""

import contextlib
from collections.abc import Iterator

import pytest

UNOPTIMISED = "jax_disable_most_optimizations"


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
