"""Tests run on 8 simulated CPU devices, unless a GPU is asked for with `-m gpu`.

Their programs are compiled without LLVM's optimisations, and by XLA's older code generator: otherwise that would be
most of the time of a test that compiles. Modules whose subject is the optimised arithmetic ask for the fixture
`optimising_compiler`. JAX_DISABLE_MOST_OPTIMIZATIONS=0 in the environment optimises all.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from compiler import UNOPTIMISED, compile_unoptimised_sooner, compiling

# The compiler cuts each program into up to 32 parts, to compile them on as many cores; on few, cutting only costs.
# The functions in a part are compiled as they would be without.
ONE_PART = "--xla_cpu_parallel_codegen_split_count=1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Lets tests run longer than in the ordinary suite."""
    parser.addoption("--fuzz", type=int, default=200, help="examples of each fuzz test (default: 200)")
    parser.addoption("--exhaustive", action="store_true", help="every model in every type on every mesh")


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the platform before any test module touches JAX."""
    if config.option.markexpr.startswith("gpu"):
        return
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    if not config.option.markexpr:
        flags = os.environ.get("XLA_FLAGS", "")
        if ONE_PART not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {ONE_PART}".strip()
        os.environ.setdefault(UNOPTIMISED.upper(), "1")
        compile_unoptimised_sooner()
    from sharded_llama.mesh import simulate_cpu_devices  # JAX reads the environment when it is imported

    simulate_cpu_devices(8)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `-m`, tests that need other hardware or another install are left out rather than skipped."""
    if config.option.markexpr:
        return
    special = {"gpu", "gpu2", "tpu_compiler"}
    items[:] = [item for item in items if not special & {m.name for m in item.iter_markers()}]


def pytest_collection_finish() -> None:
    """Tracing makes many objects: collect garbage less often, and not among what was imported."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module")
def optimising_compiler() -> Iterator[None]:
    """For tests whose subject is what the arithmetic of optimised programs gives."""
    with compiling(optimised=True):
        yield


@pytest.fixture(scope="session")
def short_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with its first layer alone: real tokens and a tokenizer, and a sixth of it to compile."""
    from sharded_llama.checkpoint import load_weights, open_checkpoint, save_weights
    from sharded_llama.engine.loading import DEMO_CHECKPOINT
    from sharded_llama.mesh import make_mesh

    source = open_checkpoint(DEMO_CHECKPOINT)
    config, folder = source.read_config(), tmp_path_factory.mktemp("demo") / "short"
    weights = load_weights(source, config, mesh=make_mesh(), progress=False)
    short = weights._replace(layers=weights.layers[:1])
    save_weights(short, config.replace(n_layers=1), folder, tokenizer_folder=DEMO_CHECKPOINT)
    return folder
