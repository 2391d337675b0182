"""The engine as its own reference: components in canonical form, whatever the mesh, and what they are compared with."""

import functools

import jax
import numpy as np
import pytest
from hf_reference import LLAMA3_ROPE, make_model, save

import sharded_llama as sl
from sharded_llama.checkpoint import ExportFormat, convert, open_checkpoint
from sharded_llama.errors import ParityError
from sharded_llama.parity.compare import compare
from sharded_llama.parity.components import EMBEDDING, EMBEDDING_AXES, HEAD, HEAD_AXES, LAYER_AXES, Stage
from sharded_llama.parity.contract import NO_BOUND
from sharded_llama.parity.engine_reference import EngineReference
from sharded_llama.parity.results import CUMULATIVE

FIELDS = {"hidden_size": 48, "head_dim": 6, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 97}
TOKENS = np.random.default_rng(1).integers(0, 97, (3, 9)).astype(np.int32)  # 3 rows do not divide over data:2
SIZES = {"B": 3, "L": 9, "S": 9, "D": 48, "H": 8, "G": 2, "K": 6, "F": 92, "V": 97}
NEW_TOKENS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    fields = {**FIELDS, "rope_parameters": LLAMA3_ROPE}
    return save(make_model("grouped", **fields), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(checkpoint):
    @functools.cache
    def load(mesh_shape=(1, 1), dtype="float32", folder=checkpoint) -> sl.LLM:
        mesh = sl.make_mesh(*mesh_shape)
        return sl.LLM(folder, mesh=mesh, dtype=dtype, skip_tokenizer=True, progress=False)

    return load


@pytest.fixture(scope="module")
def stages(llm):
    @functools.cache
    def run(mesh_shape=(1, 1)) -> dict[str, Stage]:
        return {stage.name: stage for stage in EngineReference(llm(mesh_shape)).stages(TOKENS)}

    return run


def test_every_component_in_its_canonical_form(stages):
    """On a mesh that repeats kv heads and pads widths, nothing is repeated or padded."""
    for mesh_shape in ((1, 1), (2, 4), (1, 8)):
        run = stages(mesh_shape)
        assert list(run) == [EMBEDDING, "layers.0", "layers.1", HEAD]
        for name, stage in run.items():
            axes = {EMBEDDING: EMBEDDING_AXES, HEAD: HEAD_AXES}.get(name, LAYER_AXES)
            shapes = {component: tuple(SIZES[a] for a in letters) for component, letters in axes.items()}
            assert {component: x.shape for component, x in stage.values.items()} == shapes
            assert {x.dtype for x in stage.values.values()} == {np.dtype(np.float32)}
            assert (stage.exact, stage.noise, stage.exact_logits) == ({}, {}, None)


def test_the_components_are_those_of_the_model(llm, stages):
    """By definitions that need no model: rows of a table, sums of neighbours, a softmax; and the logits that serve."""
    run, weights = stages(), llm().weights
    table = np.asarray(weights.tok_embeddings)
    np.testing.assert_array_equal(run[EMBEDDING].values["embedding"], table[TOKENS])
    hidden = run[EMBEDDING].values["embedding"]
    for layer in ("layers.0", "layers.1"):
        values = run[layer].values
        np.testing.assert_array_equal(values["attn_residual"], hidden + values["attn_wo"])
        np.testing.assert_array_equal(values["ffn_residual"], values["attn_residual"] + values["down"])
        np.testing.assert_allclose(values["attn_weights"].sum(-1), 1, rtol=1e-6)
        v_BSHK = np.repeat(values["v"], 4, axis=2)
        expected = np.einsum("bhls,bshk->blhk", values["attn_weights"], v_BSHK)
        np.testing.assert_allclose(values["attn"], expected, rtol=1e-4, atol=1e-5)
        hidden = values["ffn_residual"]
    logits = run[HEAD].values["logits"]
    np.testing.assert_allclose(logits, np.asarray(llm().forward(TOKENS)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mesh_shape", [(2, 4), (1, 8)], ids=str)
def test_every_mesh_gives_the_same_components(stages, mesh_shape):
    for name, stage in stages(mesh_shape).items():
        for component, x in stage.values.items():
            np.testing.assert_allclose(x, stages()[name].values[component], rtol=1e-3, atol=1e-5, err_msg=component)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)], ids=str)
def test_a_continuation_and_its_margins(llm, mesh_shape):
    """The tokens are served; a margin is the largest logit less the next one where the token was chosen."""
    greedy = EngineReference(llm(mesh_shape)).greedy(TOKENS, NEW_TOKENS)
    whole = np.concatenate([TOKENS, greedy.tokens_BN[:, :-1]], axis=1)
    logits_BNV = np.asarray(llm().forward(whole))[:, TOKENS.shape[1] - 1 :]
    ordered = np.sort(logits_BNV, axis=-1)
    np.testing.assert_array_equal(greedy.tokens_BN, logits_BNV.argmax(-1))
    np.testing.assert_allclose(greedy.margins_BN, ordered[..., -1] - ordered[..., -2], rtol=1e-2, atol=1e-4)
    assert greedy.tokens_BN.dtype == np.int32
    assert greedy.margins_BN.dtype == np.float64
    assert (greedy.margins_BN > 0).all()


def test_what_made_it(llm):
    reference = EngineReference(llm((2, 4)))
    assert reference.dtype == "float32"
    expected = f"sharded_llama, jax {jax.__version__}, mesh data:2,model:4 (cpu), attention: blockwise"
    assert reference.made_by == expected


def test_a_conversion_has_equal_bits(checkpoint, llm, tmp_path):
    """The same programs on the same mesh: every component has its bits, and so has the continuation."""
    source = open_checkpoint(checkpoint)
    convert(source, source.read_config(), tmp_path / "orbax", ExportFormat("orbax"), progress=False)
    reference = EngineReference(llm((2, 4), folder=tmp_path / "orbax"))
    report = compare(llm((2, 4)), reference, TOKENS, modes=[CUMULATIVE], chunk=4, new_tokens=NEW_TOKENS)
    assert len(report.rows) == 1 + 2 * len(LAYER_AXES) + 2
    assert [row for row in report.rows if row.difference != (0, 0, 1, None)] == []
    assert [row.first_difference for row in report.greedy] == [None] * 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_meshes_are_within_the_contract(llm, dtype):
    report = compare(llm((1, 2), dtype), EngineReference(llm((1, 8), dtype)), TOKENS, chunk=4, components_only=True)
    assert report.passed, report.first_failure
    assert all(row.bound is not None for row in report.rows if row.mode != CUMULATIVE and row.component != "layer")
    assert any(row.difference.relative > 0 for row in report.rows)  # they are two computations


def test_two_types_are_compared_only_where_nothing_is_expected(llm):
    half, reference = llm((1, 1), "bfloat16"), EngineReference(llm())
    with pytest.raises(ParityError, match="the reference is float32, the model bfloat16: compare equal types"):
        compare(half, reference, TOKENS)
    report = compare(half, reference, TOKENS, modes=[CUMULATIVE], expect=NO_BOUND, components_only=True)
    assert report.passed
    assert {row.bound for row in report.rows} == {None}
    errors = {(row.stage, row.component): row.difference.relative for row in report.rows}
    assert 0.5 * 2**-9 < errors[EMBEDDING, "embedding"] < 2**-8  # one rounding of each value
    assert errors[EMBEDDING, "embedding"] < errors["layers.1", "ffn_residual"] < 0.1
