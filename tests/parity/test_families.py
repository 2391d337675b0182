"""The engine against PyTorch, component by component: demo model and families, in every type, on every kind of mesh.

The families are random models, reduced in depth, width and vocabulary; families that reduce to the same model share it.
The demo model runs in every type, each on another mesh. Each family runs in every type on three of the four meshes, and
every type meets every mesh; with --exhaustive all combinations run, which takes some six minutes more. The demo model
and three families are compiled as users compile them, with LLVM's optimisations; the others only with --exhaustive.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from compiler import compiling
from reduced_models import distinct_families, reduced_fields, save_reduced

import sharded_llama as sl
from sharded_llama.engine.loading import DEMO_CHECKPOINT
from sharded_llama.parity.compare import compare
from sharded_llama.parity.results import CUMULATIVE, ISOLATED
from sharded_llama.parity.torch_reference import TorchReference
from sharded_llama.parity.transformers_model import open_transformers

MESHES = [(1, 1), (1, 2), (2, 4), (1, 8)]
DTYPES = ["float64", "float32", "bfloat16"]
FAMILIES = list(distinct_families())
# Compared in whole prompts too, each in another type: plain and scaled rotary embeddings, one kv head, three query
# heads for each, a tied output.
WHOLE = ("llama2_70b", "llama3_2_1b", "llama3_2_3b")
Case = tuple[str, str, tuple[int, int]]  # model, type, mesh
TOKENS = np.random.default_rng(1).integers(0, 131, (3, 13))  # 3 rows do not divide over data:2

# Components that PyTorch and XLA compute with the same bits on one CPU device, fed the same inputs: copies and single
# additions. docs/parity.md says why the others are not.
ALWAYS_EQUAL = {"embedding", "attn_residual", "ffn_residual", "k_cache", "v_cache"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The combinations of model, type and mesh."""
    cases = all_cases() if metafunc.config.option.exhaustive else chosen_cases()
    ids = [f"{name}-{dtype}-{mesh[0]}x{mesh[1]}" for name, dtype, mesh in cases]
    if "mesh_shape" in metafunc.fixturenames:
        metafunc.parametrize(("name", "dtype", "mesh_shape"), cases, ids=ids)


def all_cases() -> list[Case]:
    return list(itertools.product(["demo", *FAMILIES], DTYPES, MESHES))


def chosen_cases() -> list[Case]:
    """Of the first and the last mesh each family has one: its type is the same on both."""
    cases = [("demo", dtype, mesh) for dtype, mesh in zip(DTYPES, [(2, 4), (1, 2), (1, 8)], strict=True)]
    for i, name in enumerate(FAMILIES):
        left_out = 0 if 2 * i < len(FAMILIES) else 3
        cases += [(name, DTYPES[(i + j) % len(DTYPES)], mesh) for j, mesh in enumerate(MESHES) if j != left_out]
    return cases


def test_what_is_left_out_of_the_ordinary_suite():
    """Every model meets every type, every type every mesh, and heads are repeated in every type."""
    cases = chosen_cases()
    assert set(cases) <= set(all_cases())
    assert len(set(cases)) == len(cases)
    assert {case[:2] for case in cases} == set(itertools.product(["demo", *FAMILIES], DTYPES))
    families = [case for case in cases if case[0] != "demo"]
    assert {case[1:] for case in families} == set(itertools.product(DTYPES, MESHES))
    assert {dtype for name, dtype, mesh in families if is_whole(name, mesh, exhaustive=False)} == set(DTYPES)
    repeated = {dtype for name, dtype, mesh in families if mesh == (1, 8) and kv_heads(name) < 8}
    assert repeated == set(DTYPES)
    assert {kv_heads(name) for name, _, mesh in families if mesh == (1, 8)} == {kv_heads(name) for name in FAMILIES}


def kv_heads(name: str) -> int:
    return int(reduced_fields(name)["num_key_value_heads"])


def is_whole(name: str, mesh_shape: tuple[int, int], exhaustive: bool) -> bool:
    """Whether whole prompts and continuations are compared too: they compile the whole model five times over.

    tests/test_parity.py has whole prompts on every mesh.
    """
    if name == "demo":
        return mesh_shape == (2, 4)
    return mesh_shape == (1, 2) and (exhaustive or name in WHOLE)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    @functools.cache
    def folder(name, dtype):
        return DEMO_CHECKPOINT if name == "demo" else save_reduced(name, tmp_path_factory.mktemp(name), dtype)

    return folder


def test_every_component_is_within_the_contract(checkpoints, pytestconfig, name, dtype, mesh_shape):
    whole = is_whole(name, mesh_shape, pytestconfig.option.exhaustive)
    folder = checkpoints(name, "bfloat16" if dtype == "bfloat16" else "float32")
    optimised = pytestconfig.option.exhaustive or name == "demo"
    with compiling(optimised), jax.enable_x64(dtype == "float64"):
        llm = sl.LLM(folder, mesh=sl.make_mesh(*mesh_shape), dtype=dtype, skip_tokenizer=True, progress=False)
        reference = TorchReference(open_transformers(folder, dtype))
        report = compare(llm, reference, TOKENS, chunk=5, new_tokens=6, components_only=not whole)
    assert report.passed, report.first_failure
    n_components = 1 + 16 * llm.config.n_layers + 2
    isolated = [row for row in report.rows if row.mode == ISOLATED]
    assert len([row for row in report.rows if row.mode == CUMULATIVE]) == n_components
    assert len(isolated) == n_components + 6 * llm.config.n_layers
    # Whatever the mesh and the type: all but sums over the mesh's shards have a bound that is judged.
    assert all(row.bound is not None for row in isolated if row.component != "layer")
    if dtype == "float64":
        assert all(row.difference.relative <= 1e-10 for row in report.rows)
    assert {row.component for row in isolated if row.difference.bit_equal < 1}.isdisjoint(ALWAYS_EQUAL)
    ways = ["one piece", "chunks of 5", "token by token", "prefill + decode"] if whole else []
    assert [row.way for row in report.logits] == ways
    assert len(report.greedy) == (3 if ways else 0)
