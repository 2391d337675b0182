"""One thing at a time is broken in the engine: the comparison names the component that it is in, and no other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_reference import LLAMA3_ROPE, make_model, save

import sharded_llama as sl
from sharded_llama import model
from sharded_llama.attention import reference as attention
from sharded_llama.engine.loading import LoadedModel
from sharded_llama.errors import ParityError
from sharded_llama.kv_cache import KVPages
from sharded_llama.parity import capture
from sharded_llama.parity.compare import compare
from sharded_llama.parity.components import Greedy
from sharded_llama.parity.results import CUMULATIVE, ISOLATED
from sharded_llama.parity.torch_reference import TorchReference
from sharded_llama.parity.transformers_model import open_transformers

TOKENS = np.random.default_rng(1).integers(0, 97, (2, 19))  # two pages of each sequence
FIELDS = {"hidden_size": 48, "head_dim": 6, "num_key_value_heads": 4, "num_hidden_layers": 2, "vocab_size": 97}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    fields = {**FIELDS, "rope_parameters": LLAMA3_ROPE}
    return save(make_model("grouped", **fields), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(checkpoint):
    return TorchReference(open_transformers(checkpoint, "float32"))


@pytest.fixture(autouse=True)
def fresh_compilations():
    """What was compiled with a fault must not be used again, nor what was compiled without it."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def load(checkpoint, mesh_shape=(1, 2)) -> sl.LLM:
    return sl.LLM(checkpoint, mesh=sl.make_mesh(*mesh_shape), skip_tokenizer=True, progress=False)


def of(llm: sl.LLM, **changes) -> sl.LLM:
    """The same model but for its config or weights."""
    fields = {"config": llm.config, "mesh": llm.mesh, "weights": llm.weights}
    return sl.LLM(LoadedModel(**fields | changes), progress=False)


def with_weights(llm: sl.LLM, change) -> sl.LLM:
    """A model whose every layer is changed on the host."""
    put = jax.device_put
    layers = tuple(
        jax.tree.map(lambda new, old: put(new, old.sharding), change(jax.tree.map(np.array, layer)), layer)
        for layer in llm.weights.layers
    )
    return of(llm, weights=llm.weights._replace(layers=layers))


def with_config(llm: sl.LLM, **changes) -> sl.LLM:
    return of(llm, config=llm.config.replace(**changes))


def wrong_eps(llm, monkeypatch):
    return with_config(llm, norm_eps=1e-6)


def transposed_wo(llm, monkeypatch):
    def change(layer):
        d, h, k = layer.wo.shape
        return layer._replace(wo=layer.wo.reshape(d, h * k).T.reshape(d, h, k))

    return with_weights(llm, change)


def interleaved_rotary(llm, monkeypatch):
    def apply(x_HK, cos, sin):
        x1, x2 = x_HK[..., 0::2], x_HK[..., 1::2]
        cos, sin = cos[..., None, :], sin[..., None, :]
        return jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).reshape(x_HK.shape)

    monkeypatch.setattr(model, "apply_rotary_emb", apply)
    return llm


def no_rope_scaling(llm, monkeypatch):
    return with_config(llm, rope_scaling=None)


def swapped_gate_and_up(llm, monkeypatch):
    return with_weights(llm, lambda layer: layer._replace(w13=layer.w13[::-1].copy()))


def shifted_cache_position(llm, monkeypatch):
    """Every token is written one place further on, the last of a page into the first of another sequence's."""
    write = KVPages.write
    monkeypatch.setattr(KVPages, "write", lambda pages, k, v, at_T: write(pages, k, v, at_T + 1))
    return llm


def swapped_keys_and_values(llm, monkeypatch):
    """Both are in the cache, each in the other's place."""
    write = KVPages.write
    monkeypatch.setattr(KVPages, "write", lambda pages, k, v, at_T: write(pages, v, k, at_T))
    return llm


def places_of(monkeypatch, change):
    """Changes where the tokens of a step go: `change` is given the rows, and the function from rows to places."""
    places = model.row_places

    def changed(rows, *args):
        return change(rows, lambda rows: places(rows, *args))

    for module in (model, capture):
        monkeypatch.setattr(module, "row_places", changed)


def one_position_for_all_rows(llm, monkeypatch):
    """Every row is written where the first one is: right as long as all rows are at the same position."""

    def change(rows, places):
        positions_T, right = places(rows)
        _, wrong = places(rows._replace(start_R=jnp.broadcast_to(rows.start_R[0], rows.start_R.shape)))
        return positions_T, right._replace(at_T=wrong.at_T)

    places_of(monkeypatch, change)
    return llm


def first_page_for_all_positions(llm, monkeypatch):
    """The table is not looked at beyond its first entry: right as long as sequences are short."""

    def change(rows, places):
        positions_T, right = places(rows)
        first_RW = jnp.broadcast_to(rows.tables_RW[:, :1], rows.tables_RW.shape)
        _, wrong = places(rows._replace(tables_RW=first_RW))
        return positions_T, right._replace(at_T=wrong.at_T)

    places_of(monkeypatch, change)
    return llm


def tables_of_the_neighbours(llm, monkeypatch):
    """Attention looks into the pages of the row before; what is written is right."""

    def change(rows, places):
        positions_T, right = places(rows)
        return positions_T, right._replace(tables_RW=jnp.roll(rows.tables_RW, 1, axis=0))

    places_of(monkeypatch, change)
    return llm


def rotary_of_the_next_position(llm, monkeypatch):
    """Rotary embeddings off by one in steps of single tokens: attention sees differences of positions, and only
    those."""

    def change(rows, places):
        positions_T, right = places(rows)
        return positions_T + (rows.tokens_T.shape == rows.start_R.shape), right

    places_of(monkeypatch, change)
    return llm


def mask_off_by_one(llm, monkeypatch):
    scores = attention._masked_scores
    monkeypatch.setattr(attention, "_masked_scores", lambda q, k, q_pos, first_key: scores(q, k, q_pos + 1, first_key))
    return llm


def wrong_kv_head_for_a_query(llm, monkeypatch):
    """Query head h attends to kv head h % G instead of h // R."""

    def regrouped(attend, n_kv_heads):
        def wrong(backend, q_HK, *args):
            by_rest = np.arange(q_HK.shape[-2]).reshape(-1, n_kv_heads).T.reshape(-1)
            return attend(backend, q_HK[..., by_rest, :], *args)[..., np.argsort(by_rest), :]

        return wrong

    for name in ("attend", "attend_pages"):
        monkeypatch.setattr(model, name, regrouped(getattr(model, name), llm.config.n_kv_heads))
    return llm


def wrong_copies_of_kv_heads(llm, monkeypatch):
    """On 8 shards each of 4 kv heads is there twice: here 0 1 2 3 0 1 2 3 instead of 0 0 1 1 2 2 3 3."""

    def change(layer):
        wqkv = layer.wqkv.copy()
        wqkv[:, -2:] = np.tile(layer.wqkv[::2, -2:], (2, 1, 1, 1))
        return layer._replace(wqkv=wqkv)

    return with_weights(llm, change)


def wrong_scale_of_scores(llm, monkeypatch):
    scores = attention._masked_scores
    monkeypatch.setattr(attention, "_masked_scores", lambda *args, **kwargs: scores(*args, **kwargs) * 1.01)
    return llm


def untied_output(llm, monkeypatch):
    """The output matrix taken from the embeddings, as if they were tied."""
    return of(llm, weights=llm.weights._replace(output=None))


ROTATED = {"q_rotated", "k_rotated", "cached_q_rotated", "cached_k_rotated"}
ATTENTION = {"attn_weights", "attn", "cached_attn"}
# Fault -> (mesh, the component that must be named, all isolated components that may leave their bounds).
FAULTS = {
    wrong_eps: ((1, 2), "attention_norm", {"attention_norm", "ffn_norm", "norm", "layer"}),
    transposed_wo: ((1, 2), "attn_wo", {"attn_wo", "layer"}),
    interleaved_rotary: ((1, 2), "q_rotated", {*ROTATED, "layer"}),
    no_rope_scaling: ((1, 2), "q_rotated", {*ROTATED, "layer"}),
    rotary_of_the_next_position: ((1, 2), "cached_q_rotated", {"cached_q_rotated", "cached_k_rotated"}),
    one_position_for_all_rows: ((1, 1), "k_cache", {"k_cache", "v_cache", "cached_attn"}),
    first_page_for_all_positions: ((1, 1), "k_cache", {"k_cache", "v_cache", "cached_attn"}),
    tables_of_the_neighbours: ((1, 1), "cached_attn", {"cached_attn"}),
    swapped_keys_and_values: ((1, 2), "k_cache", {"k_cache", "v_cache", "cached_attn"}),
    swapped_gate_and_up: ((1, 2), "gate", {"gate", "up", "layer"}),
    shifted_cache_position: ((1, 2), "k_cache", {"k_cache", "v_cache", "cached_attn"}),
    mask_off_by_one: ((1, 2), "attn_weights", {*ATTENTION, "layer"}),
    wrong_kv_head_for_a_query: ((1, 1), "attn", {"attn", "cached_attn", "layer"}),
    wrong_copies_of_kv_heads: ((1, 8), "k", {"k", "v", "layer"}),
    wrong_scale_of_scores: ((1, 2), "attn_weights", {*ATTENTION, "layer"}),
    untied_output: ((1, 2), "logits", {"logits"}),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_broken_component_is_named(fault, checkpoint, reference, monkeypatch):
    mesh_shape, component, may_fail = FAULTS[fault]
    broken = fault(load(checkpoint, mesh_shape), monkeypatch)
    through_cache = "cache" in component or fault is transposed_wo
    report = compare(broken, reference, TOKENS, chunk=5, new_tokens=0, components_only=not through_cache)
    assert not report.passed
    assert (report.first_failure.mode, report.first_failure.component) == (ISOLATED, component)
    failed = {row.component for row in report.rows if row.mode == ISOLATED and not row.passed}
    assert failed == may_fail
    assert any(not row.passed for row in report.logits) == through_cache
    if "cache" not in component:  # what only shows through the cache leaves the prompt itself right
        assert not [row for row in report.rows if row.mode == CUMULATIVE][-1].passed


def test_the_position_of_a_single_wrong_weight_is_named(checkpoint, reference):
    """One row of w1 is off in one layer: that channel of the gate, in that layer, and nothing before it."""

    def change(layer):
        w13 = layer.w13.copy()
        w13[0, 17] *= 1.001
        return layer._replace(w13=w13)

    llm = load(checkpoint)
    changed = with_weights(llm, change).weights.layers[1]
    broken = of(llm, weights=llm.weights._replace(layers=(llm.weights.layers[0], changed)))
    report = compare(broken, reference, TOKENS, modes=[ISOLATED], new_tokens=0)
    row = report.first_failure
    assert (row.stage, row.component, row.axes, row.difference.worst.position[2]) == ("layers.1", "gate", "BLF", 17)
    worst = row.difference.worst
    assert worst.ours == pytest.approx(1.001 * worst.theirs, rel=1e-5)


def test_without_a_fault_nothing_is_named(checkpoint, reference):
    report = compare(load(checkpoint, (1, 8)), reference, TOKENS, chunk=5, new_tokens=4)
    assert report.passed, report.first_failure
    assert report.first_failure is None


def test_a_replica_without_a_row_of_its_own_is_compared(checkpoint, reference):
    """One row on four replicas: the others repeat it. w2 is wrong on the last one alone."""
    llm = load(checkpoint, (4, 1))

    def broken_on_the_last(w2):
        shards = [np.array(shard.data) for shard in w2.addressable_shards]
        shards[-1][:] *= 1.5
        arrays = [jax.device_put(x, s.device) for x, s in zip(shards, w2.addressable_shards, strict=True)]
        return jax.make_array_from_single_device_arrays(w2.shape, w2.sharding, arrays)

    layers = tuple(layer._replace(w2=broken_on_the_last(layer.w2)) for layer in llm.weights.layers)
    broken = of(llm, weights=llm.weights._replace(layers=layers))
    report = compare(broken, reference, TOKENS[:1], chunk=5, components_only=True)
    assert (report.first_failure.component, report.first_failure.difference.worst.position[0]) == ("down", 0)


def test_a_token_that_the_engine_prefers_by_more_than_noise(checkpoint, reference):
    """A reference whose two best tokens tie, neither of them ours: the engine's own preference shows it."""

    @dataclasses.dataclass(frozen=True)
    class Tied(TorchReference):
        def greedy(self, tokens_BL, new_tokens):
            tokens_BN = super().greedy(tokens_BL, new_tokens).tokens_BN.copy()
            tokens_BN[1, 2] = (tokens_BN[1, 2] + 1) % 97
            return Greedy(tokens_BN, np.zeros(tokens_BN.shape))

    report = compare(load(checkpoint), Tied(reference.model), TOKENS, modes=[CUMULATIVE], new_tokens=4)
    row = report.first_failure
    assert (row.row, row.first_difference, row.margin) == (1, 2, 0)
    assert row.own_margin > 1e3 * row.noise
    assert [greedy.passed for greedy in report.greedy] == [True, False]


def test_padding_of_the_vocabulary_that_could_be_sampled(checkpoint, reference, monkeypatch):
    real = capture.head
    monkeypatch.setattr(capture, "head", lambda *args: jnp.nan_to_num(real(*args), neginf=-1e3))
    with pytest.raises(ParityError, match="padding of the vocabulary, from 97 on"):
        compare(load(checkpoint, (1, 2)), reference, TOKENS, components_only=True)


def test_a_reference_of_another_depth_or_width(checkpoint, reference, tmp_path):
    llm = load(checkpoint)
    for changes, message in (
        ({"num_hidden_layers": 1}, "gives head where layers.1 should come"),
        ({"num_hidden_layers": 3}, "gives layers.2 where head should come"),
        ({"intermediate_size": 90}, r"gives gate of layers.0 in shape \(2, 19, 90\); this model's is \(2, 19, 92\)"),
    ):
        folder = save(make_model("grouped", **{**FIELDS, "rope_parameters": LLAMA3_ROPE, **changes}), tmp_path)
        other = TorchReference(open_transformers(folder, "float32"))
        with pytest.raises(ParityError, match=message):
            compare(llm, other, TOKENS, components_only=True)
    with pytest.raises(ParityError, match="must be some of isolated, cumulative"):
        compare(llm, reference, TOKENS, modes=["isolate"])


def test_values_that_are_not_finite_fail(checkpoint, reference):
    def change(layer):
        w2 = layer.w2.copy()
        w2[3, 5] = np.nan
        return layer._replace(w2=w2)

    report = compare(with_weights(load(checkpoint), change), reference, TOKENS, new_tokens=0)
    assert report.first_failure.component == "down"
    assert report.first_failure.difference.worst.position[2] == 3


def test_a_fault_shows_the_growth_with_depth(checkpoint, reference):
    """The cumulative mode carries the error on; the isolated one shows that later norms are right."""
    report = compare(
        with_config(load(checkpoint), rope_scaling=None), reference, TOKENS, modes=[CUMULATIVE], new_tokens=0
    )
    errors = [row.difference.relative for row in report.rows if row.component == "ffn_residual"]
    assert 1e-6 < errors[0] < errors[1]
    assert dataclasses.replace(report, rows=()).first_failure is not None  # the logits
