"""Tests run on 8 simulated CPU devices, unless a GPU is asked for with `-m gpu`."""

import os
from collections.abc import Iterator

import pytest

# The compiler cuts each program into up to 32 parts, to compile them on as many cores; on few, cutting only costs.
# The functions in a part are compiled as they would be without.
ONE_PART = "--xla_cpu_parallel_codegen_split_count=1"
UNOPTIMISED = "jax_disable_most_optimizations"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Lets tests run longer than in the ordinary suite."""
    parser.addoption("--fuzz", type=int, default=200, help="examples of each fuzz test (default: 200)")
    parser.addoption("--exhaustive", action="store_true", help="every model in every type on every mesh")


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the platform before any test module touches JAX."""
    if config.option.markexpr.startswith("gpu"):
        return
    from sharded_llama.mesh import simulate_cpu_devices

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    flags = os.environ.get("XLA_FLAGS", "")
    if not config.option.markexpr and ONE_PART not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {ONE_PART}".strip()
    simulate_cpu_devices(8)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `-m`, tests that need other hardware or another install are left out rather than skipped."""
    if config.option.markexpr:
        return
    special = {"gpu", "gpu2", "tpu_compiler"}
    items[:] = [item for item in items if not special & {m.name for m in item.iter_markers()}]


@pytest.fixture(scope="module")
def quick_compiler() -> Iterator[None]:
    """Programs are compiled without optimisation, here and in processes that are started.

    For tests that spend their time on compiling and whose subject is not what the optimised arithmetic gives. What
    they compiled is not left to others, nor taken from them: JAX's caches on disk know the difference, those in memory
    do not.
    """
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(UNOPTIMISED.upper(), "1")
        jax.clear_caches()
        jax.config.update(UNOPTIMISED, True)
        yield
        jax.config.update(UNOPTIMISED, False)
        jax.clear_caches()
