"""References in a file: bit for bit what was saved, or an error that names the file; whatever happens on the way."""

import dataclasses
import json
import math
import os
import resource
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hf_models import assert_bits_equal, put_together, take_apart, to_numpy
from hypothesis import given, strategies as st
from hypothesis.strategies import SearchStrategy
from json_mutations import Raw, damaged_json, mutated_json
from mutations import fuzz_settings, guarded, mutated
from safetensors import safe_open

from sharded_llama import __version__
from sharded_llama.config import DTYPES, LlamaConfig, RopeScaling
from sharded_llama.errors import ParityError
from sharded_llama.parity import reference_writer
from sharded_llama.parity.components import EMBEDDING, HEAD, Greedy, Stage, layer_stage, stage_axes
from sharded_llama.parity.reference_file import ReferenceFile, check_model, open_reference
from sharded_llama.parity.reference_writer import save_reference

CONFIG = LlamaConfig(
    dim=6,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=2,
    ffn_dim=5,
    vocab_size=11,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64),
    max_seq_len=512,
    bos_id=1,
    eos_ids=(2, 5),
    dtype="float32",
)
TOKENS = np.array([[0, 10, 3], [4, 2, 9]], np.int32)
SIZES = {"B": 2, "L": 3, "S": 3, "D": 6, "H": 4, "G": 2, "K": 2, "F": 5, "V": 11}
NEW_TOKENS = 4
SETTINGS = {"prompt": "It was \u00fcber", "chat": "no"}
HALF = ("bfloat16", "float16")


class MadeUp:
    """A `Reference` of random arrays, the same ones in every run. `before` is called before each stage is made."""

    made_by = "made up 1.0 (\u00e9)"

    def __init__(self, dtype: str, attn_weights: bool = True, before: Callable[[str], None] = lambda stage: None):
        self.dtype = dtype
        self.left_out = () if attn_weights else ("attn_weights",)
        self.before = before

    def stages(self, tokens_BL: np.ndarray) -> Iterator[Stage]:
        np.testing.assert_array_equal(tokens_BL, TOKENS)
        for i, name in enumerate([EMBEDDING, *map(layer_stage, range(CONFIG.n_layers)), HEAD]):
            self.before(name)
            yield self.stage(i, name)

    def stage(self, i: int, name: str) -> Stage:
        rng = np.random.default_rng(i)
        axes = {c: a for c, a in stage_axes(name).items() if c not in self.left_out}

        def arrays(dtype: str) -> dict[str, np.ndarray]:
            wide = {c: np.asarray(rng.normal(size=[SIZES[a] for a in letters])) for c, letters in axes.items()}
            return {c: x.astype(np.float32 if c == "logits" and dtype in HALF else dtype) for c, x in wide.items()}

        values, exact = arrays(self.dtype), arrays("float32") if self.dtype in HALF else {}
        noise = {} if self.dtype == "float64" else {c: float(rng.random()) for c in axes}
        noise.pop("up", None)  # one that is not known
        higher = {"float32": "float64", "bfloat16": "float32", "float16": "float32"}
        has_more = name == HEAD and self.dtype in higher
        return Stage(name, values, exact, noise, arrays(higher[self.dtype])["logits"] if has_more else None)

    def greedy(self, tokens_BL: np.ndarray, new_tokens: int) -> Greedy:
        self.before("greedy")
        rng = np.random.default_rng(99)
        return Greedy(rng.integers(0, 11, (2, new_tokens)).astype(np.int32), rng.random((2, new_tokens)))


def save(file: Path, reference: Any = None, tokens: np.ndarray = TOKENS, **changes: Any) -> int:
    options = {"config": CONFIG, "fingerprint": "f00d", "new_tokens": NEW_TOKENS, "settings": SETTINGS} | changes
    return save_reference(file, reference or MadeUp("float32"), tokens, **options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A float32 reference to break."""
    save(tmp_path / "r.safetensors")
    return tmp_path / "r.safetensors"


def assert_stages_equal(actual: Stage, expected: Stage) -> None:
    assert actual.name == expected.name
    for ours, theirs in ((actual.values, expected.values), (actual.exact, expected.exact)):
        assert list(ours) == list(theirs)
        for component in theirs:
            assert_bits_equal(ours[component], theirs[component])
    assert actual.noise == expected.noise
    assert (actual.exact_logits is None) == (expected.exact_logits is None)
    if expected.exact_logits is not None:
        assert_bits_equal(actual.exact_logits, expected.exact_logits)


# --- there and back


@pytest.mark.parametrize("attn_weights", [True, False], ids=["all", "without attn_weights"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_comes_back_bit_for_bit(tmp_path: Path, dtype: str, attn_weights: bool):
    reference = MadeUp(dtype, attn_weights)
    assert save(tmp_path / "r.safetensors", reference) == (tmp_path / "r.safetensors").stat().st_size
    opened = open_reference(tmp_path / "r.safetensors")
    assert (opened.made_by, opened.dtype, opened.fingerprint) == (reference.made_by, dtype, "f00d")
    assert (opened.config, opened.settings) == (CONFIG.replace(dtype=dtype), SETTINGS)
    assert (opened.new_tokens, opened.file) == (NEW_TOKENS, tmp_path / "r.safetensors")
    assert_bits_equal(opened.tokens_BL, TOKENS)
    stages, expected = list(opened.stages(TOKENS)), list(reference.stages(TOKENS))
    assert len(stages) == len(expected) == 4
    for actual, stage in zip(stages, expected, strict=True):
        assert_stages_equal(actual, stage)
    assert bool(stages[1].exact) == (dtype in HALF)
    assert (stages[3].exact_logits is None) == (dtype == "float64") == (not stages[1].noise)
    assert ("attn_weights" in stages[1].values) == attn_weights
    tokens, margins = reference.greedy(TOKENS, NEW_TOKENS)
    for n in (NEW_TOKENS, 1, 0):
        continued = opened.greedy(TOKENS.astype(np.int64), n)
        assert_bits_equal(continued.tokens_BN, tokens[:, :n])
        assert_bits_equal(continued.margins_BN, margins[:, :n])
    assert [path.name for path in tmp_path.iterdir()] == ["r.safetensors"]


def test_without_new_tokens_the_continuation_is_not_asked_for(tmp_path: Path):
    asked = []
    save(tmp_path / "r", MadeUp("float64", before=asked.append), new_tokens=0, settings={})
    assert asked == ["embedding", "layers.0", "layers.1", "head"]
    opened = open_reference(tmp_path / "r")
    assert (opened.new_tokens, opened.settings) == (0, {})
    assert opened.greedy(TOKENS, 0).tokens_BN.shape == (2, 0)


def test_values_that_are_not_finite(tmp_path: Path):
    class Overflown(MadeUp):
        def stage(self, i: int, name: str) -> Stage:
            stage = super().stage(i, name)
            for component, x in stage.values.items():
                x.reshape(-1)[:3] = [math.nan, math.inf, -math.inf]
                stage.noise[component] = math.inf
            return stage

    save(tmp_path / "r", Overflown("bfloat16"))
    opened = open_reference(tmp_path / "r")
    for actual, expected in zip(opened.stages(TOKENS), Overflown("bfloat16").stages(TOKENS), strict=True):
        assert_stages_equal(actual, expected)
        assert set(actual.noise.values()) == {math.inf}


def test_one_stage_in_memory_at_a_time(tmp_path: Path):
    alive: dict[str, list[weakref.ref]] = {}

    def living() -> set[str]:
        return {stage for stage, arrays in alive.items() if any(array() is not None for array in arrays)}

    def watch(stage: Stage) -> Stage:
        arrays = [*stage.values.values(), *stage.exact.values()]
        arrays += [] if stage.exact_logits is None else [stage.exact_logits]
        alive[stage.name] = [weakref.ref(array) for array in arrays]
        return stage

    class Watched(MadeUp):
        def stage(self, i: int, name: str) -> Stage:
            return watch(super().stage(i, name))

    seen = {}
    save(tmp_path / "r", Watched("bfloat16", before=lambda stage: seen.__setitem__(stage, living())))
    # The header needs the first layer.
    assert seen == {"embedding": set(), "layers.0": {"embedding"}, "layers.1": set(), "head": set(), "greedy": set()}
    alive.clear()
    names = []
    for stage in open_reference(tmp_path / "r").stages(TOKENS):
        assert living() == set()
        names.append(watch(stage).name)
        assert living() == {stage.name}
        del stage
    assert names == ["embedding", "layers.0", "layers.1", "head"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opens_with_the_safetensors_library(tmp_path: Path, dtype: str):
    save(tmp_path / "r.safetensors", MadeUp(dtype))
    embedding, layer, *_, head = MadeUp(dtype).stages(TOKENS)
    with safe_open(tmp_path / "r.safetensors", "pt") as f:
        stored = {name: to_numpy(f.get_tensor(name)) for name in f.keys()}  # noqa: SIM118
        metadata = f.metadata()
    assert_bits_equal(stored["embedding/embedding"], embedding.values["embedding"])
    assert_bits_equal(stored["layers.0/q"], layer.values["q"])
    assert_bits_equal(stored["head/logits"], head.values["logits"])
    np.testing.assert_array_equal(stored["tokens"], TOKENS)
    np.testing.assert_array_equal(stored["greedy/tokens"], MadeUp(dtype).greedy(TOKENS, NEW_TOKENS).tokens_BN)
    assert ("exact/layers.0/q" in stored) == (dtype in HALF)
    assert ("noise/layers.0" in stored) == ("head/exact_logits" in stored) == (dtype != "float64")
    if dtype != "float64":
        by_component = dict(zip(stage_axes("layers.0"), stored["noise/layers.0"], strict=True))
        assert math.isnan(by_component.pop("up"))
        assert by_component == layer.noise
    assert metadata["format"] == "sharded_llama parity reference"
    assert (metadata["version"], metadata["package_version"]) == ("1", __version__)
    assert json.loads(metadata["config"]) == json.loads(json.dumps(dataclasses.asdict(CONFIG.replace(dtype=dtype))))
    assert json.loads(metadata["settings"]) == SETTINGS


# --- asking for something else


def test_other_tokens(saved: Path):
    opened = open_reference(saved)
    other = TOKENS.copy()
    other[1, 1:] = 7
    for ask in (opened.stages, lambda tokens: opened.greedy(tokens, 1)):
        with pytest.raises(ParityError, match=r"r\.safetensors: .*row 1 at position 1: it has 2, and 7 is asked for"):
            ask(other)
        with pytest.raises(ParityError, match=r"r\.safetensors: is for tokens of shape \(2, 3\), not \(2, 2\)"):
            ask(TOKENS[:, :2])


@pytest.mark.parametrize("n", [5, -1])
def test_more_new_tokens_than_there_are(saved: Path, n: int):
    with pytest.raises(ParityError, match=rf"r\.safetensors: holds 4 new tokens of each row, not {n}"):
        open_reference(saved).greedy(TOKENS, n)


def test_the_same_model(saved: Path):
    opened = open_reference(saved)
    check_model(opened, CONFIG, "f00d")
    check_model(opened, CONFIG.replace(max_seq_len=64, bos_id=None, eos_ids=()), "f00d")


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"n_layers": 3}, ["another model", "n_layers: it has 2, this run 3"]),
        (
            {"rope_theta": 1e4, "dim": 8},
            ["rope_theta: it has 500000.0, this run 10000.0", "dim: .* 6, .* 8"],
        ),
        ({"rope_scaling": None}, [r"rope_scaling: it has RopeScaling\(factor=8.0, .*, this run None"]),
        ({"tie_embeddings": True}, ["tie_embeddings: it has False, this run True"]),
        ({"norm_eps": 1e-6, "dtype": "bfloat16"}, ["norm_eps: it has 1e-05, this run 1e-06"]),
        (
            {"dtype": "bfloat16"},
            ["the reference is float32, this run bfloat16: give --dtype=float32, or make .* with --dtype=bfloat16"],
        ),
        ({}, ["other weights", "'f00d'", "'beef'"]),
    ],
    ids=["layers", "two fields", "scaling", "tied", "eps and dtype", "dtype", "fingerprint"],
)
def test_another_model(saved: Path, changes: dict[str, Any], messages: list[str]):
    for message in messages:
        with pytest.raises(ParityError, match=rf"r\.safetensors: .*{message}"):
            check_model(open_reference(saved), CONFIG.replace(**changes), "beef")


def test_every_field_counts_that_changes_numbers(saved: Path):
    other = {
        "dim": 8,
        "n_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 4,
        "head_dim": 4,
        "ffn_dim": 4,
        "vocab_size": 12,
        "norm_eps": 1e-4,
        "rope_theta": 1.0,
        "rope_scaling": None,
        "tie_embeddings": True,
        "dtype": "float64",
    }
    neutral = {"max_seq_len": 8, "bos_id": 2, "eos_ids": (1,)}
    assert other.keys() | neutral.keys() == {field.name for field in dataclasses.fields(LlamaConfig)}
    for name, value in other.items():
        with pytest.raises(ParityError, match=name):
            check_model(open_reference(saved), CONFIG.replace(**{name: value}), "f00d")


# --- files that are no references, or broken ones


def opening(file: Path, message: str) -> None:
    with pytest.raises(ParityError, match=rf"{file.name}: .*{message}"):
        open_reference(file)


def rebuilt(file: Path, change: Callable[[dict[str, tuple[str, list[int], bytes]], dict[str, str]], None]) -> None:
    """Takes a file apart, lets `change` change the tensors and the metadata, and lays it out again."""
    header, data = take_apart(file)
    metadata = header.pop("__metadata__")
    tensors = {name: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for name, e in header.items()}
    change(tensors, metadata)
    new, end = {"__metadata__": metadata}, 0
    for name, (dtype, shape, content) in tensors.items():
        new[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + len(content)]}
    put_together(file, new, b"".join(content for _, _, content in tensors.values()))


def test_files_of_another_kind(tmp_path: Path):
    opening(tmp_path / "absent", "cannot be read: No such file")
    (tmp_path / "folder").mkdir()
    opening(tmp_path / "folder", "cannot be read: Is a directory")
    (tmp_path / "text").write_text("not a reference at all, but long enough")
    opening(tmp_path / "text", "is not a safetensors file")
    put_together(tmp_path / "bare", {}, b"")
    opening(tmp_path / "bare", "is not a parity reference")
    put_together(tmp_path / "checkpoint", {"__metadata__": {"format": "pt"}}, b"")
    opening(tmp_path / "checkpoint", "is not a parity reference")
    os.mkfifo(tmp_path / "pipe")
    opening(tmp_path / "pipe", "is not a regular file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2"}, "is of version '2' of the format; version '1' can be read"),
        ({"version": None}, "is of version None of the format"),
        ({"made_by": None}, "metadata has to have just format, version, .*made_by"),
        ({"comment": "more"}, "metadata has to have just"),
        ({"made_by": "x" * 65537}, "made_by in its metadata has more than 65536 characters"),
        ({"config": "x" * (12 << 20)}, "config in its metadata has more than 65536 characters"),
        ({"config": "{"}, "config in its metadata is not JSON"),
        ({"config": "[" * 60_000}, "config in its metadata is not JSON"),
        ({"config": "9" * 5000}, "config in its metadata is not JSON"),
        ({"config": "[]"}, "config in its metadata is not a JSON object"),
        ({"config": "{}"}, "is not a model's: the model config lacks dim"),
        ({"settings": "null"}, "settings in its metadata is not a JSON object"),
        ({"settings": '{"prompt": 1}'}, "settings in its metadata are not text by name"),
        ({"settings": '{"prompt": "\\ud800"}'}, "settings in its metadata is not JSON"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_metadata_that_is_wrong(saved: Path, change: dict[str, str | None], message: str):
    def apply(tensors: dict, metadata: dict) -> None:
        for name, value in change.items():
            metadata.pop(name) if value is None else metadata.update({name: value})

    rebuilt(saved, apply)
    opening(saved, message)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_layers", 10**9, "n_layers=1000000000 must be at most"),
        ("n_layers", "2", "n_layers='2' must be a whole number"),
        ("dim", -6, "dim=-6 must be"),
        ("norm_eps", float("nan"), "norm_eps=nan must be a finite number"),
        ("eos_ids", [[2]], "eos_ids"),
        ("eos_ids", 2, "eos_ids=2 must be a tuple"),
        ("rope_scaling", [], "rope_scaling"),
        ("rope_scaling", {"factor": 8.0}, "rope_scaling lacks"),
        ("dtype", "int8", "dtype='int8' is not one of"),
        ("dtype", {}, "dtype"),
        ("colour", 1, "has no field 'colour'"),
    ],
)
def test_a_config_that_is_wrong(saved: Path, field: str, value: Any, message: str):
    def apply(tensors: dict, metadata: dict) -> None:
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | {field: value})

    rebuilt(saved, apply)
    opening(saved, f"config in its metadata is not a model's: .*{message}")


@pytest.mark.parametrize("depth", range(400, 1000, 50))
def test_a_config_that_is_nested_deeply(saved: Path, depth: int):
    def apply(tensors: dict, metadata: dict) -> None:
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | {"dim": 0}).replace(
            '"dim": 0', '"dim": ' + "[" * depth + "]" * depth
        )

    rebuilt(saved, apply)
    opening(saved, "config in its metadata is not")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("layers.1/q", None, "lacks tensor layers.1/q"),
        ("tokens", None, "lacks tensor tokens"),
        ("greedy/tokens", None, "lacks tensor greedy/tokens"),
        ("greedy/margins", None, "lacks tensor greedy/margins"),
        ("noise/head", None, "lacks tensor noise/head"),
        ("head/exact_logits", None, "lacks tensor head/exact_logits"),
        ("layers.1/attn_weights", None, "lacks tensor layers.1/attn_weights"),
        ("layers.0/attn_weights", None, "tensors that no such reference has: layers.1/attn_weights"),
        ("layers.2/q", ("F32", [1], bytes(4)), "tensors that no such reference has: layers.2/q"),
        ("layers.1/q", ("F32", [2, 3, 2, 4], bytes(192)), r"layers.1/q is float32 \(2, 3, 2, 4\).* \(2, 3, 4, 2\)"),
        ("layers.1/q", ("F64", [2, 3, 4, 2], bytes(384)), "layers.1/q is float64 .* has to be float32"),
        ("noise/layers.0", ("F64", [15], bytes(120)), r"noise/layers.0 is float64 \(15,\), .* \(16,\)"),
        ("tokens", ("F64", [2, 4], bytes(64)), "tensor embedding/embedding is"),
        ("tokens", ("F32", [2, 3], bytes(24)), "tensor tokens is float32"),
        ("tokens", ("F64", [6], bytes(48)), r"tokens has to be a matrix, not of shape \(6,\)"),
        ("tokens", ("F64", [0, 3], b""), "tensor tokens is empty"),
        ("tokens", ("F64", [2, 0], b""), "tensor tokens is empty"),
        ("greedy/tokens", ("F64", [8], bytes(64)), "greedy/tokens has to be a matrix"),
        ("greedy/tokens", ("F64", [2, 5], bytes(80)), "greedy/margins is"),
        ("greedy/tokens", ("F64", [1, 4], bytes(32)), "greedy/tokens is"),
        ("tokens", ("I64", [2, 3], bytes(48)), "tensor tokens has dtype I64, which is not supported"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_tensors_that_are_wrong(saved: Path, name: str, change: tuple | None, message: str):
    def apply(tensors: dict, metadata: dict) -> None:
        tensors.pop(name) if change is None else tensors.update({name: change})

    rebuilt(saved, apply)
    opening(saved, message)


def test_a_description_of_another_type_or_size(saved: Path):
    def describe(**changes: Any) -> Callable[[dict, dict], None]:
        return lambda tensors, metadata: metadata.update(config=json.dumps(json.loads(metadata["config"]) | changes))

    for changes, message in (
        ({"dtype": "float64"}, "embedding/embedding is float32"),
        ({"dtype": "bfloat16"}, "embedding/embedding is float32"),
        ({"dtype": "float32", "n_layers": 10_000}, "lacks tensor layers.2/attention_norm"),
        ({"n_layers": 1}, "no such reference has: layers.1/activation, .*and"),
        ({"n_layers": 2, "vocab_size": 12}, "head/logits is"),
    ):
        rebuilt(saved, describe(**changes))
        opening(saved, message)
    rebuilt(saved, describe(vocab_size=11))
    assert open_reference(saved).config == CONFIG


@pytest.mark.parametrize("value", [-1.0, 11.0, 0.5, math.nan, math.inf, -math.inf, 2.0**40])
@pytest.mark.parametrize(("name", "width"), [("tokens", 3), ("greedy/tokens", 4)])
def test_tokens_outside_the_vocabulary(saved: Path, name: str, width: int, value: float):
    def apply(tensors: dict, metadata: dict) -> None:
        dtype, shape, content = tensors[name]
        tokens = np.frombuffer(content).reshape(2, width).copy()
        tokens[1, 2] = value
        tensors[name] = dtype, shape, tokens.tobytes()

    rebuilt(saved, apply)
    opening(saved, f"tensor {name} has {value} in row 1 at position 2, which is no token id in 0..10")


def test_cut_short_anywhere(tmp_path: Path):
    save(tmp_path / "r", MadeUp("float64"), new_tokens=1, settings={})
    data = (tmp_path / "r").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for length in reversed(range(len(data))):
        os.truncate(tmp_path / "r", length)
        with pytest.raises(ParityError) as error:
            open_reference(tmp_path / "r")
        wanted = "is not a safetensors file" if length < 8 else "is truncated"
        assert str(error.value).startswith(f"{tmp_path / 'r'}: {wanted}"), error.value
        assert ("within its header" in str(error.value)) == (8 <= length < header)


def test_cut_short_after_it_was_opened(saved: Path):
    opened = open_reference(saved)
    os.truncate(saved, saved.stat().st_size // 2)
    with pytest.raises(ParityError, match=r"r\.safetensors: cannot read tensor greedy/tokens"):
        opened.greedy(TOKENS, 1)
    with pytest.raises(ParityError, match=r"r\.safetensors: cannot read tensor .*longer when it was opened"):
        list(opened.stages(TOKENS))


# --- writing that fails


def test_places_that_cannot_be_written(tmp_path: Path):
    asked = []
    (tmp_path / "file").write_text("")
    for file, message in (
        (tmp_path / "absent" / "r", "absent/r: cannot be written: No such file or directory"),
        (tmp_path / "file" / "r", "file/r: cannot be written: Not a directory"),
        (tmp_path / ("x" * 250), "cannot be written: File name too long"),
        (tmp_path, "is a folder; name a file"),
    ):
        with pytest.raises(ParityError, match=message):
            save(file, MadeUp("float32", before=asked.append))
    assert not asked  # nothing is computed in vain
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_shows_before_it_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(reference_writer.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ParityError, match=r"r: needs 0\.00 GB, but 0\.00 GB are free there"):
        save(tmp_path / "r")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.01, 0.7, 0.9999])
def test_a_disk_that_fills_up_while_writing(tmp_path: Path, share: float):
    limit = int(save(tmp_path / "r") * share)
    (tmp_path / "r").write_text("the old one")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ParityError) as error:
            save(tmp_path / "r")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f"{tmp_path / 'r'}: cannot be written: File too large."
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    assert (tmp_path / "r").read_text() == "the old one"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError(5, "of the reference"), MemoryError])
@pytest.mark.parametrize("where", ["embedding", "layers.0", "layers.1", "head", "greedy"])
def test_an_interrupt_leaves_nothing_new(tmp_path: Path, where: str, error: Any):
    def interrupt(stage: str) -> None:
        if stage == where:
            raise error

    for old in (None, b"the old one"):
        if old is not None:
            (tmp_path / "r").write_bytes(old)
        kind = error if isinstance(error, type) else type(error)
        with pytest.raises(kind):  # an error of the reference's own is not one of writing
            save(tmp_path / "r", MadeUp("float32", before=interrupt))
        assert [path.name for path in tmp_path.iterdir()] == ["r"][: old is not None]
    assert (tmp_path / "r").read_bytes() == b"the old one"
    save(tmp_path / "r")
    assert open_reference(tmp_path / "r").config == CONFIG


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[0], r"tokens must be whole numbers of shape \(rows, length\), not int32 \(3,\)"),
        (TOKENS[:0], r"tokens must be .*\(0, 3\)"),
        (TOKENS.astype(np.float32), "tokens must be whole numbers .*float32"),
        (np.array([[0, 11]]), r"token 11 is no token id in 0\.\.10"),
        (np.array([[-1, 11]]), r"token -1 is no token id in 0\.\.10"),
    ],
)
def test_tokens_to_save_that_are_wrong(tmp_path: Path, tokens: np.ndarray, message: str):
    with pytest.raises(ParityError, match=message):
        save(tmp_path / "r", tokens=tokens)
    assert not list(tmp_path.iterdir())


def test_a_description_that_is_too_long_is_refused_at_once(tmp_path: Path):
    asked = []
    with pytest.raises(ParityError, match="settings in its metadata has more than 65536 characters"):
        save(tmp_path / "r", MadeUp("float32", before=asked.append), settings={"prompt": "x" * 70_000})
    assert not asked


class Wrong(MadeUp):
    """A reference with one thing wrong."""

    def __init__(self, dtype: str, change: Callable[[Stage], Stage | None]):
        super().__init__(dtype)
        self.change = change

    def stages(self, tokens_BL: np.ndarray) -> Iterator[Stage]:
        for stage in super().stages(tokens_BL):
            changed = self.change(stage)
            if changed is not None:
                yield changed


def without(component: str) -> Callable[[Stage], Stage]:
    return lambda stage: stage._replace(values={c: x for c, x in stage.values.items() if c != component})


def replaced(component: str, by: Callable[[np.ndarray], np.ndarray]) -> Callable[[Stage], Stage]:
    return lambda stage: stage._replace(values={c: by(x) if c == component else x for c, x in stage.values.items()})


@pytest.mark.parametrize(
    ("dtype", "change", "message"),
    [
        ("float32", without("q"), "does not give layers.0/q"),
        ("float32", lambda s: s if s.name == "layers.0" else without("attn_weights")(s), "layers.1/attn_weights"),
        ("float32", lambda s: s if s.name != "layers.0" else without("attn_weights")(s), "gives layers.1/attn_weights"),
        ("float32", replaced("gate", lambda x: x[..., :-1]), r"layers.0/gate as float32 \(2, 3, 4\), .*\(2, 3, 5\)"),
        ("float32", replaced("up", lambda x: x.astype(np.float64)), "layers.0/up as float64"),
        ("bfloat16", replaced("logits", lambda x: x.astype(ml_dtypes.bfloat16)), "head/logits as bfloat16"),
        ("float32", lambda s: s._replace(noise={}), "does not give noise/embedding"),
        ("float32", lambda s: s._replace(exact_logits=None), "does not give head/exact_logits"),
        ("float32", lambda s: s._replace(exact=s.values), "gives exact/embedding/embedding"),
        ("float64", lambda s: s._replace(noise={"q": 0.0}), "gives noise/embedding"),
        ("float16", lambda s: s._replace(exact={}), "does not give exact/embedding/embedding"),
        ("float32", lambda s: s._replace(values=s.values | {"q2": s.values}), "gives embedding/q2"),
        ("float32", lambda s: s if s.name != "layers.1" else None, "gives head where layers.1 should come"),
        ("float32", lambda s: s if s.name != "head" else None, "ends where head should come"),
        ("float32", lambda s: None, "ends where embedding should come"),
    ],
)
def test_a_reference_that_is_wrong(tmp_path: Path, dtype: str, change: Callable, message: str):
    with pytest.raises(ParityError, match=f"the reference .*{message}"):
        save(tmp_path / "r", Wrong(dtype, change))
    assert not list(tmp_path.iterdir())


def test_a_reference_of_another_model(tmp_path: Path):
    with pytest.raises(ParityError, match=r"gives embedding/embedding as float32 \(2, 3, 6\), .*\(2, 3, 8\)"):
        save(tmp_path / "r", config=CONFIG.replace(dim=8))
    with pytest.raises(ParityError, match=r"gives layers\.1 where head should come"):
        save(tmp_path / "r", config=CONFIG.replace(n_layers=1))

    class Endless(MadeUp):
        def stages(self, tokens_BL: np.ndarray) -> Iterator[Stage]:
            yield from super().stages(tokens_BL)
            yield self.stage(3, HEAD)

    with pytest.raises(ParityError, match="goes on after head"):
        save(tmp_path / "r", Endless("float32"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tokens", "margins", "message"),
    [
        (np.full((2, 4), 11, np.int32), np.zeros((2, 4)), "token 11 is no token id"),
        (np.zeros((2, 3), np.int32), np.zeros((2, 4)), r"greedy/tokens as float64 \(2, 3\)"),
        (np.zeros((2, 4), np.int32), np.zeros((2, 4), np.float32), "greedy/margins as float32"),
    ],
)
def test_a_continuation_that_is_wrong(tmp_path: Path, tokens: np.ndarray, margins: np.ndarray, message: str):
    reference = MadeUp("float32")
    reference.greedy = lambda tokens_BL, n: Greedy(tokens, margins)
    with pytest.raises(ParityError, match=message):
        save(tmp_path / "r", reference)
    assert not list(tmp_path.iterdir())


# --- damage: refused as such, or a reference that works

HEADER_VALUES = [
    *("F64", "F32", "BF16", "F16", "format", "version", "1", "2", "config", "settings", "made_by", "fingerprint"),
    *("tokens", "greedy/tokens", "layers.0/q", "exact/layers.0/q", "noise/layers.0", "head/exact_logits"),
    *(Raw(text) for text in ("[2,3]", "[0,3]", "[3,2]", "[2,3,4,2]", "[2,3,2,4]", "[0,48]", "[48,0]", "[2]")),
]
CONFIG_VALUES = [
    *("float32", "bfloat16", "float16", "float64", "dim", "n_layers", "dtype", "rope_scaling", "factor", "vocab_size"),
    *(Raw(text) for text in ("3", "6", "11", "10000", "[2,5]", "[11]", '{"factor":8.0}', "8.0", "500000")),
]


def verdict(file: Path, data: bytes) -> str:
    file.write_bytes(data)
    with guarded(len(data)):
        try:
            opened = open_reference(file)
            read = list(opened.stages(opened.tokens_BL))
            continued = opened.greedy(opened.tokens_BL, opened.new_tokens)
        except ParityError as e:
            return "refused" if str(e).startswith(f"{file}: ") else f"refused without naming the file: {e}"
    check_works(opened, read, continued)
    return "read"


def check_works(opened: ReferenceFile, read: list[Stage], continued: Greedy) -> None:
    """Every stage of the described model is there, in the sizes and types that follow from the description."""
    config = opened.config
    batch, length = opened.tokens_BL.shape
    sizes = {"B": batch, "L": length, "S": length, "D": config.dim, "H": config.n_heads, "G": config.n_kv_heads}
    sizes |= {"K": config.head_dim, "F": config.ffn_dim, "V": config.vocab_size}
    assert [stage.name for stage in read] == ["embedding", *map(layer_stage, range(config.n_layers)), "head"]
    for stage in read:
        axes = {c: a for c, a in stage_axes(stage.name).items() if c in stage.values or c != "attn_weights"}
        shapes = {c: tuple(sizes[a] for a in letters) for c, letters in axes.items()}
        assert {c: x.shape for c, x in stage.values.items()} == shapes
        assert {x.dtype for c, x in stage.values.items() if c != "logits"} == {np.dtype(config.jnp_dtype)}
        assert {c: x.shape for c, x in stage.exact.items()} == (shapes if opened.dtype in HALF else {})
        json.dumps(stage.noise).encode()
    for tokens in (opened.tokens_BL, continued.tokens_BN):
        assert tokens.dtype == np.int32
        assert ((tokens >= 0) & (tokens < config.vocab_size)).all()
    assert continued.tokens_BN.shape == continued.margins_BN.shape == (batch, opened.new_tokens)
    json.dumps([opened.made_by, opened.fingerprint, opened.settings], ensure_ascii=False).encode()


def run(request: pytest.FixtureRequest, strategy: SearchStrategy, file: Path) -> None:
    """Judges the files of a strategy. Both verdicts must occur, or the damage does not test anything."""
    verdicts: Counter[str] = Counter()

    @fuzz_settings(request)
    @given(strategy)
    def check(data: bytes) -> None:
        verdicts[verdict(file, data)] += 1

    check()
    assert verdicts.keys() == {"read", "refused"}, verdicts


@pytest.fixture
def sources(tmp_path: Path) -> list[bytes]:
    """Small files, of which a good part is the header."""
    data = []
    for dtype in ("float32", "float16"):
        save(tmp_path / "source", MadeUp(dtype), new_tokens=1)
        data.append((tmp_path / "source").read_bytes())
    return data


def with_header(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def test_undamaged_files_are_read(tmp_path: Path, sources: list[bytes]):
    assert [verdict(tmp_path / "r", data) for data in sources] == ["read", "read"]


def test_damage_anywhere(request: pytest.FixtureRequest, tmp_path: Path, sources: list[bytes]):
    run(request, st.sampled_from(sources).flatmap(mutated), tmp_path / "r")


def test_damage_to_the_header(request: pytest.FixtureRequest, tmp_path: Path, sources: list[bytes]):
    def damage(source: bytes) -> SearchStrategy[bytes]:
        end = 8 + int.from_bytes(source[:8], "little")
        text, data = source[8:end].rstrip(), source[end:]
        return mutated_json(text, HEADER_VALUES).map(lambda text: with_header(text, data))

    run(request, st.sampled_from(sources).flatmap(damage), tmp_path / "r")


def test_damage_to_the_description(request: pytest.FixtureRequest, tmp_path: Path, sources: list[bytes]):
    def damage(choice: tuple[bytes, str]) -> SearchStrategy[bytes]:
        source, field = choice
        end = 8 + int.from_bytes(source[:8], "little")
        header, data = json.loads(source[8:end]), source[end:]

        def put(text: bytes) -> bytes:
            metadata = header["__metadata__"] | {
                field: text.decode("utf-8", "surrogatepass" if valid(text) else "replace")
            }
            return with_header(json.dumps(header | {"__metadata__": metadata}).encode(), data)

        return damaged_json(header["__metadata__"][field].encode(), CONFIG_VALUES).map(put)

    fields = st.sampled_from(["config", "config", "config", "settings"])
    run(request, st.tuples(st.sampled_from(sources), fields).flatmap(damage), tmp_path / "r")


def valid(text: bytes) -> bool:
    try:
        text.decode("utf-8", "surrogatepass")
    except ValueError:
        return False
    return True
