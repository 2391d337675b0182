"""The PyTorch references against whole runs of transformers, against formulas in NumPy, and against each other."""

import contextlib
import functools
import json
import pickle
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hf_models import state_of
from hf_reference import LLAMA3_ROPE, MODELS, PLAIN_ROPE, distance, in_dtype, logits, make_model, rounded, save
from meta_models import CONFIG, save_meta
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from sharded_llama.errors import ParityError
from sharded_llama.parity import torch_reference
from sharded_llama.parity.components import EMBEDDING, HEAD, Stage, layer_stage, stage_axes
from sharded_llama.parity.meta_model import open_meta_model
from sharded_llama.parity.torch_reference import HIGHER, Tap, TorchModel, TorchReference, relative_distance
from sharded_llama.parity.transformers_model import kept_in_float64, open_transformers

# Shapes that Meta's layout can say: the head width is dim / n_heads.
SHAPES = {"num_key_value_heads": 4, "head_dim": 8, "hidden_size": 64, "vocab_size": 104, "intermediate_size": 96}
FACTOR = 16.0
SCALED_ROPE = LLAMA3_ROPE | {"factor": FACTOR, "original_max_position_embeddings": 8192}
PARAMS = {"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 4, "norm_eps": 1e-5, "multiple_of": 96}
SCALED, UNSCALED = {"rope_theta": 500_000.0, "use_scaled_rope": True}, {"rope_theta": 10_000.0}
TOKENS = np.random.default_rng(1).integers(0, 61, (2, 9)).astype(np.int32)
NUMPY = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def meta_shaped(scaled: bool = True, **changes: object) -> LlamaForCausalLM:
    """A random model that Meta's layout can say."""
    return make_model(**SHAPES | {"rope_parameters": SCALED_ROPE if scaled else PLAIN_ROPE} | changes)


def meta_folder(folder: Path, model: LlamaForCausalLM, params: dict, dtype: str = "float32", **how: object) -> Path:
    """The model as Meta's download; a tied one has no output matrix."""
    state = state_of(in_dtype(model, dtype))
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_meta(folder, state, CONFIG.replace(head_dim=8, dtype=dtype), params=params, **how)
    return folder


def open_both(folder: Path, dtype: str, stored: str) -> dict[str, TorchModel]:
    """One scaled model from both kinds of folders."""
    model = meta_shaped()
    return {
        "transformers": open_transformers(save(model, folder / "hf", stored), dtype),
        "meta": open_meta_model(
            meta_folder(folder / "meta", model, PARAMS | SCALED, stored, files=2), dtype, rope_factor=FACTOR
        ),
    }


def stored_as(dtype: str) -> str:
    return "float32" if dtype == "float64" else dtype


@contextlib.contextmanager
def in_precision(dtype: str) -> Iterator[None]:
    with torch.no_grad(), kept_in_float64() if dtype == "float64" else contextlib.nullcontext():
        yield


def whole_run(model: LlamaForCausalLM, dtype: str) -> dict[tuple[str, str], np.ndarray]:
    """What one ordinary call of transformers shows, by stage and component, in float64."""
    with in_precision(dtype):
        out = in_dtype(model, dtype)(
            torch.from_numpy(TOKENS).long(), use_cache=False, output_hidden_states=True, output_attentions=True
        )
    # The last hidden state has the final norm.
    names = [(EMBEDDING, EMBEDDING), *((layer_stage(i), "ffn_residual") for i in range(2)), (HEAD, "norm")]
    seen = dict(zip(names, out.hidden_states, strict=True))
    seen |= {(layer_stage(i), "attn_weights"): x for i, x in enumerate(out.attentions)}
    seen[HEAD, "logits"] = out.logits
    return {name: x.double().numpy() for name, x in seen.items()}


def formulas(values: dict[str, np.ndarray], before: np.ndarray, model: LlamaForCausalLM, layer: int) -> dict:
    """Each component of a layer in float64 from the values before it; attention as a whole."""
    state = {name: x.double().numpy() for name, x in model.model.layers[layer].state_dict().items()}
    inv_freq = model.model.rotary_emb.inv_freq.double().numpy()

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x.reshape(*TOKENS.shape, -1) @ state[f"{name}_proj.weight"].T

    def rotated(x: np.ndarray) -> np.ndarray:
        turn = np.exp(1j * np.arange(x.shape[1])[:, None] * inv_freq)[:, None]
        turned = (x[..., : x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    q, k, v = values["q_rotated"], values["k_rotated"], values["v"]
    k, v = (x.repeat(q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("blhk,bshk->bhls", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    gate = values["gate"]
    norm = functools.partial(rms_norm, eps=model.config.rms_norm_eps)
    return {
        "attention_norm": norm(before, state["input_layernorm.weight"]),
        "q": linear(values["attention_norm"], "self_attn.q").reshape(values["q"].shape),
        "k": linear(values["attention_norm"], "self_attn.k").reshape(values["k"].shape),
        "v": linear(values["attention_norm"], "self_attn.v").reshape(values["v"].shape),
        "q_rotated": rotated(values["q"]),
        "k_rotated": rotated(values["k"]),
        "attn_weights": weights,
        "attn": np.einsum("bhls,bshk->blhk", weights, v),
        "attn_wo": linear(values["attn"], "self_attn.o"),
        "attn_residual": before + values["attn_wo"],
        "ffn_norm": norm(values["attn_residual"], state["post_attention_layernorm.weight"]),
        "gate": linear(values["ffn_norm"], "mlp.gate"),
        "up": linear(values["ffn_norm"], "mlp.up"),
        "activation": gate / (1 + np.exp(-gate)) * values["up"],
        "down": linear(values["activation"], "mlp.down"),
        "ffn_residual": values["attn_residual"] + values["down"],
    }


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def as_float64(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x.astype(np.float64) for name, x in arrays.items()}


def assert_close(values: dict[str, np.ndarray], expected: dict[str, np.ndarray], bound: float, where: str) -> None:
    assert list(values) == list(expected), where
    for name, x in values.items():
        assert x.shape == expected[name].shape, (where, name)
        assert distance(x, expected[name]) < bound, (where, name)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_own_run_is_bit_equal_to_transformers(tmp_path: Path, name: str, dtype: str):
    opened = open_transformers(save(make_model(name), tmp_path, stored_as(dtype)), dtype)
    stages = {stage.name: stage for stage in TorchReference(opened).stages(TOKENS)}
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype), attn_implementation="eager")
    seen = whole_run(model, dtype)
    assert len(seen) == 8
    for (stage, component), expected in seen.items():
        np.testing.assert_array_equal(stages[stage].values[component].astype(np.float64), expected)
    # Nothing is left behind on the modules or in the library.
    with in_precision(dtype):
        again = opened.model(torch.from_numpy(TOKENS).long(), use_cache=False).logits
    np.testing.assert_array_equal(again.double().numpy(), seen[HEAD, "logits"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_inverse_frequencies_stay_in_float32(tmp_path: Path, dtype: str):
    model = make_model("grouped_llama3")
    opened = open_transformers(save(model, tmp_path, dtype), dtype)
    assert opened.dtype == getattr(torch, dtype)
    inv_freq, expected = opened.model.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq
    assert inv_freq.dtype == torch.float32
    assert torch.equal(inv_freq, expected)
    assert not torch.equal(inv_freq, inv_freq.to(opened.dtype).float())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_components(tmp_path: Path, dtype: str):
    """Of both models: forms, order, types, and each component as the formula of those before it."""
    model = rounded(meta_shaped(), stored_as(dtype))
    half = dtype in ("bfloat16", "float16")
    sizes = dict(zip("BLSHGKDFV", (2, 9, 9, 8, 4, 8, 64, 96, 104), strict=True))
    for kind, opened in open_both(tmp_path, dtype, stored_as(dtype)).items():
        reference = TorchReference(opened)
        assert reference.dtype == dtype
        stages = list(reference.stages(TOKENS))
        assert [stage.name for stage in stages] == [EMBEDDING, "layers.0", "layers.1", "layers.2", HEAD]
        before = None
        for i, stage in enumerate(stages):
            axes = stage_axes(stage.name)
            assert list(stage.values) == list(axes), kind
            for name, x in stage.values.items():
                assert x.shape == tuple(sizes[axis] for axis in axes[name]), name
                assert x.dtype == (np.float32 if half and name == "logits" else NUMPY[dtype]), name
                assert x.flags.c_contiguous, name
                assert not x.flags.writeable, name
            assert list(stage.noise) == ([] if dtype == "float64" else list(axes))
            assert all(x.dtype == np.float32 for x in stage.exact.values())
            assert (stage.exact_logits is not None) == (stage.name == HEAD and dtype != "float64")
            values = as_float64(stage.values)
            if stage.name == EMBEDDING:
                table = model.model.embed_tokens.weight.detach().double().numpy()
                expected = {EMBEDDING: table[TOKENS]}
            elif stage.name == HEAD:
                weight = model.model.norm.weight.detach().double().numpy()
                output = model.lm_head.weight.detach().double().numpy()
                native_norm = stages[-1].values["norm"].astype(np.float64)
                expected = {
                    "norm": rms_norm(before, weight, model.config.rms_norm_eps),
                    "logits": native_norm @ output.T,
                }
            else:
                expected = formulas(values, before, model, i - 1)
            if half:
                assert_close(as_float64(stage.exact), expected, 1e-6, f"{kind} {stage.name}")
                assert_close(values, expected, 2**-7, f"{kind} {stage.name}")
            else:
                assert stage.exact == {}
                assert_close(values, expected, {"float64": 1e-14, "float32": 1e-6}[dtype], f"{kind} {stage.name}")
            before = values.get("ffn_residual", values.get(EMBEDDING))


@pytest.mark.parametrize(("dtype", "higher"), [("float32", "float64"), ("bfloat16", "float32"), ("float16", "float32")])
def test_noise(tmp_path: Path, dtype: str, higher: str):
    """The distance of two whole runs that know nothing of each other."""
    model = make_model("grouped_llama3")
    reference = TorchReference(open_transformers(save(model, tmp_path, dtype), dtype))
    own, exact = whole_run(rounded(model, dtype), dtype), whole_run(rounded(model, dtype), higher)
    stages = {stage.name: stage for stage in reference.stages(TOKENS)}
    assert stages[EMBEDDING].noise == {EMBEDDING: 0.0}
    for (stage, component), x in own.items():
        expected = distance(x, exact[stage, component])
        assert stages[stage].noise[component] == pytest.approx(expected, rel=1e-9)
        assert stage == EMBEDDING or expected > {"float32": 1e-8, "bfloat16": 1e-3, "float16": 1e-4}[dtype]
    exact_logits = stages[HEAD].exact_logits
    assert exact_logits.dtype == NUMPY[higher]
    np.testing.assert_array_equal(exact_logits.astype(np.float64), exact[HEAD, "logits"])


def test_relative_distance(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_reference, "CHUNK", 3)
    x, exact = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64).T
    assert relative_distance(x, exact) == pytest.approx(distance(x.numpy(), exact.numpy()), rel=1e-14)
    huge = torch.tensor([3e38])  # the squares would overflow
    assert relative_distance(huge, huge / 2) == pytest.approx(1.0)
    zero, one, nan = torch.zeros(2), torch.ones(2), torch.full((2,), torch.nan)
    assert relative_distance(zero, zero) == 0
    assert relative_distance(one, zero) == np.inf
    assert np.isnan(relative_distance(one, nan))
    assert np.isnan(relative_distance(nan, one))


@dataclass(frozen=True)
class Spy:
    """A model that looks, whenever a stage begins, whether the components of the stage before are gone."""

    model: TorchModel
    seen: list[weakref.ref]
    alive: list[int]  # how many were still there, by stage

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def layer(self, layer: int, hidden: torch.Tensor, tap: Tap, dtype: torch.dtype) -> torch.Tensor:
        return self._watched(functools.partial(self.model.layer, layer), hidden, tap, dtype)

    def head(self, hidden: torch.Tensor, tap: Tap, dtype: torch.dtype) -> torch.Tensor:
        return self._watched(self.model.head, hidden, tap, dtype)

    def _watched(self, forward: Callable, hidden: torch.Tensor, tap: Tap, dtype: torch.dtype) -> torch.Tensor:
        def watch(name: str, x: torch.Tensor) -> torch.Tensor:
            if name != "ffn_residual":  # the hidden states go on
                self.seen.append(weakref.ref(x))
            return tap(name, x)

        if dtype == self.model.dtype and hidden.dtype == dtype:  # the first run of a stage
            self.alive.append(sum(x() is not None for x in self.seen))
            self.seen.clear()
        return forward(hidden, watch, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_holds_one_stage_at_a_time(tmp_path: Path, dtype: str):
    for opened in open_both(tmp_path, dtype, dtype).values():
        spy = Spy(opened, [], [])
        stages = TorchReference(spy).stages(TOKENS)
        for _ in range(5):
            stage = next(stages)
            spy.seen.extend(weakref.ref(x) for x in (*stage.values.values(), *stage.exact.values()))
            del stage
        assert spy.alive == [0, 0, 0, 0]
        assert len(spy.seen) == (6 if dtype == "float32" else 10)  # norm and logits: of each run, and as arrays


def test_large_attention_weights_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for opened in open_both(tmp_path, "bfloat16", "bfloat16").values():
        complete = list(TorchReference(opened).stages(TOKENS))[2]
        for limit, kept in ((2 * 8 * 9 * 9 * 2, True), (2 * 8 * 9 * 9 * 2 - 1, False)):
            monkeypatch.setattr(torch_reference, "MAX_ATTENTION_BYTES", limit)
            stage = list(TorchReference(opened).stages(TOKENS))[2]
            for now, whole in ((stage.values, complete.values), (stage.exact, complete.exact)):
                expected = [name for name in whole if kept or name != "attn_weights"]
                assert list(now) == expected
                for name in expected:
                    np.testing.assert_array_equal(now[name].astype(np.float32), whole[name].astype(np.float32))
            assert stage.noise == {name: complete.noise[name] for name in stage.values}
        monkeypatch.undo()


def test_greedy(tmp_path: Path):
    model = make_model("grouped_llama3")
    greedy = TorchReference(open_transformers(save(model, tmp_path), "float32")).greedy(TOKENS, 8)
    tokens = torch.from_numpy(TOKENS).long()
    model.generation_config.eos_token_id = None  # which counts as any
    generated = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=8, pad_token_id=0
    )
    assert greedy.tokens_BN.dtype == np.int32
    np.testing.assert_array_equal(greedy.tokens_BN, generated[:, 9:].numpy())
    ranked = np.sort(logits(model, generated.numpy()[:, :-1], "float32")[:, 8:], axis=-1)
    assert greedy.margins_BN.dtype == np.float64
    assert greedy.margins_BN.min() > 1e-2
    np.testing.assert_allclose(greedy.margins_BN, ranked[..., -1] - ranked[..., -2], rtol=0, atol=1e-4)


def test_greedy_of_both_models_agrees(tmp_path: Path):
    theirs, ours = (TorchReference(x).greedy(TOKENS, 6) for x in open_both(tmp_path, "float64", "float32").values())
    np.testing.assert_array_equal(ours.tokens_BN, theirs.tokens_BN)
    np.testing.assert_allclose(ours.margins_BN, theirs.margins_BN, rtol=0, atol=1e-10)


@dataclass(frozen=True)
class Table:
    """A model without layers whose logits are a row of a table."""

    logits_VV: torch.Tensor
    made_by: str = "a table"
    n_layers: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        return self.logits_VV.device

    @property
    def vocab_size(self) -> int:
        return len(self.logits_VV)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[..., None].float()

    def head(self, hidden: torch.Tensor, tap: Tap, dtype: torch.dtype) -> torch.Tensor:
        return self.logits_VV[hidden[..., 0].long()]


def test_greedy_takes_the_lowest_of_equal_tokens():
    table = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 2.0, 5.0], [1.0, 1.0, 1.0, 1.5], [9.0, 9.0, 9.0, 9.0]])
    greedy = TorchReference(Table(table)).greedy(np.array([[3, 2], [1, 1]]), 4)
    np.testing.assert_array_equal(greedy.tokens_BN, [[3, 0, 1, 0], [0, 1, 0, 1]])
    np.testing.assert_array_equal(greedy.margins_BN, [[0.5, 0, 0, 0], [0, 0, 0, 0]])
    assert TorchReference(Table(table)).greedy(np.array([[3, 2]]), 0).tokens_BN.shape == (1, 0)


def test_a_component_that_does_not_appear():
    stages = TorchReference(Table(torch.zeros(4, 4))).stages(np.array([[3, 2]]))
    assert next(stages).name == EMBEDDING
    with pytest.raises(ParityError, match=r"a table cannot be observed: norm, logits of head"):
        next(stages)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2], [3, 4]], "Row 1, token 1 is 4; the reference's token ids are 0 to 3."),
        ([[-1, 7]], "Row 0, token 0 is -1"),
        ([1, 2], r"shape \(2,\)"),
        ([[]], r"shape \(1, 0\)"),
    ],
)
def test_wrong_tokens(tokens: list, message: str):
    reference = TorchReference(Table(torch.zeros(4, 4)))
    with pytest.raises(ParityError, match=message):
        next(reference.stages(np.array(tokens)))
    with pytest.raises(ParityError, match=message):
        reference.greedy(np.array(tokens), 1)


META_CASES = [
    (1, "vocabulary", True, False),
    (1, "width", False, True),
    (2, "vocabulary", False, False),
    (2, "width", True, True),
    (4, "vocabulary", True, True),
    (4, "width", True, False),
]


@pytest.mark.parametrize(("files", "embeddings", "scaled", "tied"), META_CASES, ids=str)
def test_meta_model_agrees_with_transformers(tmp_path: Path, files: int, embeddings: str, scaled: bool, tied: bool):
    model = meta_shaped(scaled, tie_word_embeddings=tied)
    params = PARAMS | (SCALED if scaled else UNSCALED)
    hf = save(model, tmp_path / "hf")
    meta = meta_folder(tmp_path / "meta", model, params, files=files, embeddings=embeddings)
    for dtype, bound in (("float64", 1e-10), ("float32", 1e-5)):
        theirs = list(TorchReference(open_transformers(hf, dtype)).stages(TOKENS))
        ours = list(TorchReference(open_meta_model(meta, dtype, rope_factor=FACTOR)).stages(TOKENS))
        assert_stages_close(ours, theirs, bound)
        if dtype == "float64":
            assert distance(ours[-1].values["logits"], logits(model, TOKENS, "float64")) < 1e-10


def assert_stages_close(ours: list[Stage], theirs: list[Stage], bound: float) -> None:
    assert [stage.name for stage in ours] == [stage.name for stage in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a.values, b.values, bound, a.name)


def test_meta_defaults(tmp_path: Path):
    """Llama 2's params.json names no theta, and 7B's no kv heads."""
    model = meta_shaped(False, num_key_value_heads=8)
    params = {name: PARAMS[name] for name in ("dim", "n_layers", "n_heads")} | {"n_kv_heads": None}
    meta = meta_folder(tmp_path / "meta", model, params, files=2, embeddings="width")
    ours = list(TorchReference(open_meta_model(meta, "float64", rope_factor=FACTOR)).stages(TOKENS))
    theirs = list(TorchReference(open_transformers(save(model, tmp_path / "hf"), "float64")).stages(TOKENS))
    assert_stages_close(ours, theirs, 1e-10)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_meta_weights_are_rounded_to_the_type_of_the_run(tmp_path: Path, dtype: str):
    """The exact runs take the weights that the model has, not the more precise ones of its file."""
    model = meta_shaped()
    meta = open_meta_model(meta_folder(tmp_path, model, PARAMS | SCALED), dtype, rope_factor=FACTOR)
    head = list(TorchReference(meta).stages(TOKENS))[-1]
    exact = logits(rounded(model, dtype), TOKENS, "float32")
    assert distance(head.exact_logits, exact) < 1e-5
    assert distance(logits(model, TOKENS, "float32"), exact) > 1e-4
    theirs = distance(logits(rounded(model, dtype), TOKENS, dtype), exact)
    assert head.noise["logits"] < 1.25 * theirs
    assert distance(head.values["logits"], exact) == pytest.approx(head.noise["logits"], rel=1e-2)


def test_meta_files_of_the_old_form(tmp_path: Path):
    """Files that torch wrote before 1.6 are no zip archives and cannot be mapped."""
    folder = meta_folder(tmp_path, meta_shaped(), PARAMS | SCALED)
    expected = list(TorchReference(open_meta_model(folder, "float32", rope_factor=FACTOR)).stages(TOKENS))
    file = folder / "consolidated.00.pth"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    assert file.read_bytes()[:2] != b"PK"
    assert_stages_close(
        list(TorchReference(open_meta_model(folder, "float32", rope_factor=FACTOR)).stages(TOKENS)), expected, 1e-30
    )


def edit_params(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "params.json").write_text(json.dumps(PARAMS | SCALED | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "consolidated.01.pth"
        tensors = torch.load(file, weights_only=True)
        changed = change(tensors)
        torch.save(tensors if changed is None else changed, file)

    return edit


def edit_file(name: str, content: bytes | None) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return edit


WQ, TABLE = "layers.0.attention.wq.weight", "tok_embeddings.weight"
BROKEN_META = {
    "no params": (edit_file("params.json", None), r"params.json does not exist"),
    "params not JSON": (edit_file("params.json", b"{"), r"params.json is not valid JSON"),
    "no dim": (edit_params(dim=None), r"params.json: dim=None; expected a whole number"),
    "heads of another width": (edit_params(n_heads=7), r"n_heads=7 .*do not go together"),
    "odd kv heads": (edit_params(n_kv_heads=3), r"n_kv_heads=3 do not go together"),
    "too many layers": (edit_params(n_layers=10**15), r"too few for the 1000000000000000 layers"),
    "a layer too many": (edit_params(n_layers=2), r"unknown tensor layers.2.attention.wk.weight"),
    "bool for a number": (edit_params(n_heads=True), r"n_heads=True; expected a whole number"),
    "theta": (edit_params(rope_theta=-1), r"rope_theta=-1; expected a number above 0"),
    "eps": (edit_params(norm_eps="1e-5"), r"norm_eps='1e-5'"),
    "flag": (edit_params(use_scaled_rope=1), r"use_scaled_rope=1; expected true or false"),
    "another width": (edit_params(dim=32, n_heads=4), r"expected floats of shape"),
    "absurd width": (edit_params(dim=8 * 10**15), r"expected floats of shape"),
    "no weights": (lambda folder: [x.unlink() for x in folder.glob("*.pth")], r"found none"),
    "first file missing": (edit_file("consolidated.00.pth", None), r"found consolidated.01.pth"),
    "cut short": (edit_file("consolidated.01.pth", b"PK\x03\x04" + bytes(99)), r"01.pth: torch's restricted loader"),
    "empty": (edit_file("consolidated.01.pth", b""), r"01.pth: torch's restricted loader"),
    "a list": (edit_tensors(lambda x: list(x)), r"01.pth: holds a list"),
    "a number": (edit_tensors(lambda x: x | {"n": 3}), r"01.pth: 'n' is not a contiguous tensor"),
    "expanded": (edit_tensors(lambda x: x | {TABLE: torch.zeros(1).expand(52, 64)}), r"is not a contiguous tensor"),
    "sparse": (edit_tensors(lambda x: x | {TABLE: torch.eye(64).to_sparse()}), r"is not a contiguous tensor"),
    "tensor missing": (edit_tensors(lambda x: {k: v for k, v in x.items() if k != WQ}), rf"01.pth: lacks tensor {WQ}"),
    "unknown tensor": (edit_tensors(lambda x: x | {"wq.bias": torch.zeros(2)}), r"unknown tensor wq.bias"),
    "shape": (edit_tensors(lambda x: x | {WQ: x[WQ][:-1]}), rf"01.pth: tensor {WQ} is .*\(31, 64\); expected"),
    "integers": (edit_tensors(lambda x: x | {WQ: x[WQ].int()}), rf"01.pth: tensor {WQ} is torch.int32"),
}


@pytest.mark.parametrize("broken", BROKEN_META)
def test_broken_meta_folder(tmp_path: Path, broken: str):
    folder = meta_folder(tmp_path, meta_shaped(), PARAMS | SCALED, files=2)
    open_meta_model(folder, "float32", rope_factor=FACTOR)
    edit, message = BROKEN_META[broken]
    edit(folder)
    with pytest.raises(ParityError, match=message):
        open_meta_model(folder, "float32", rope_factor=FACTOR)


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def test_nothing_is_executed(tmp_path: Path):
    trap = tmp_path / "executed"
    meta = meta_folder(tmp_path / "meta", meta_shaped(), PARAMS | SCALED)
    hf = save(meta_shaped(), tmp_path / "hf")
    (hf / "model.safetensors").unlink()
    for zipped in (True, False):
        torch.save({TABLE: Touches(trap)}, meta / "consolidated.00.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ParityError, match="restricted loader"):
            open_meta_model(meta, "float32", rope_factor=FACTOR)
        torch.save({TABLE: Touches(trap)}, hf / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ParityError, match="transformers cannot load it"):
            open_transformers(hf, "float32")
    assert not trap.exists()
    pickle.loads(pickle.dumps(Touches(trap)))
    assert trap.exists()  # as it would have


def test_broken_hugging_face_folder(tmp_path: Path):
    for nothing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ParityError, match=r"config.json does not exist"):
            open_transformers(nothing, "float32")
    folder = save(make_model(), tmp_path / "hf")
    file, config = folder / "model.safetensors", folder / "config.json"
    settings = config.read_text()
    for text, message in (
        (settings[1:], r"config.json is not valid JSON"),
        (settings.replace('"model_type": "llama"', '"model_type": "mistral"'), r"model_type='mistral'; only 'llama'"),
        (settings.replace('"num_attention_heads": 8', '"num_attention_heads": 7'), r"transformers cannot load it"),
    ):
        config.write_text(text)
        with pytest.raises(ParityError, match=message):
            open_transformers(folder, "float32")
    config.write_text(settings)
    whole = load_file(file)
    save_file({name: x for name, x in whole.items() if "layers.1.mlp.up" not in name}, file, {"format": "pt"})
    with pytest.raises(ParityError, match=r"hf lacks tensors: model.layers.1.mlp.up_proj.weight"):
        open_transformers(folder, "float32")
    save_file(whole | {"model.norm.weight": torch.ones(3)}, file, {"format": "pt"})
    with pytest.raises(ParityError, match=r"hf: transformers cannot load it"):
        open_transformers(folder, "float32")
    file.write_bytes(file.read_bytes()[:999])
    with pytest.raises(ParityError, match=r"hf: transformers cannot load it"):
        open_transformers(folder, "float32")


def test_wrong_dtype_or_device(tmp_path: Path):
    save(make_model(), tmp_path)
    for opener in (open_transformers, functools.partial(open_meta_model, rope_factor=FACTOR)):
        folder = (
            tmp_path if opener is open_transformers else meta_folder(tmp_path / "m", meta_shaped(), PARAMS | SCALED)
        )
        with pytest.raises(ParityError, match=r"dtype='int8' is not supported; expected one of float64, float32"):
            opener(folder, "int8")
        with pytest.raises(ParityError, match=r"device='abacus' cannot be used"):
            opener(folder, "float32", device="abacus")


def test_loading_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture):
    save(make_model(), tmp_path)
    capfd.readouterr()
    open_transformers(tmp_path, "float32")
    assert capfd.readouterr() == ("", "")
    assert modeling_llama.logging.is_progress_bar_enabled()
    LlamaForCausalLM.from_pretrained(tmp_path)  # the test would see it otherwise
    assert "Loading weights" in capfd.readouterr().err


def test_types_have_a_higher_one():
    assert set(torch_reference.DTYPES.values()) == {torch.float64, *HIGHER}
    assert all(torch.finfo(higher).bits > torch.finfo(dtype).bits for dtype, higher in HIGHER.items())
