"""Tests run on 8 simulated CPU devices, unless a GPU is asked for with `-m gpu`."""

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Lets tests run longer than in the ordinary suite."""
    parser.addoption("--fuzz", type=int, default=500, help="examples of each fuzz test (default: 500)")
    parser.addoption("--exhaustive", action="store_true", help="every family in every type on every mesh")


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the platform before any test module touches JAX."""
    if config.option.markexpr.startswith("gpu"):
        return
    from sharded_llama.mesh import simulate_cpu_devices

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    simulate_cpu_devices(8)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `-m`, tests that need other hardware or another install are left out rather than skipped."""
    if config.option.markexpr:
        return
    special = {"gpu", "gpu2", "tpu_compiler"}
    items[:] = [item for item in items if not special & {m.name for m in item.iter_markers()}]
