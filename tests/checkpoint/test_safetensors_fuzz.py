"""Damaged safetensors checkpoints: refused as such, or read as the safetensors library reads them.

`--fuzz=N`: N examples of each kind.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import assert_bits_equal, put_together, to_numpy
from hypothesis import given, strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from json_mutations import Raw, damaged_json, mutated_json
from mutations import fuzz_settings, guarded, mutated, spliced
from safetensors import safe_open
from safetensors.torch import save, save_file

from sharded_llama.checkpoint.hf import safetensors
from sharded_llama.checkpoint.hf.safetensors import SafetensorsWriter, open_safetensors
from sharded_llama.checkpoint.names import HF_NAMES, to_canonical
from sharded_llama.checkpoint.source import CheckpointSource, TensorInfo
from sharded_llama.errors import CheckpointError

INDEX = "model.safetensors.index.json"
# What a header may say: names that are read, dtypes of each width, shapes and byte ranges.
HEADER_VALUES = [
    *("F64", "F32", "F16", "BF16", "F16", "BF16", "I64", "F8_E4M3", "f32", "BOOL", "__metadata__", "pt"),
    *("model.norm.weight", "norm", "lm_head.weight", "output", "rotary_emb.inv_freq", "dtype", "shape", "data_offsets"),
    *(Raw(text) for text in ("[]", "[0]", "[1]", "[2,3]", "[3,2]", "[6]", "[6,1]", "[0,9]", "[1,1,6]", "[0,0]")),
    *(Raw(f"[0,{2**40},{2**40}]") for _ in range(2)),
    *(Raw(f"[{2**40},{2**40},0]") for _ in range(2)),
    Raw("[" + ",".join(["1"] * 33) + "]"),
    *(Raw(f'{{"dtype":"F32","shape":[0],"data_offsets":[{at},{at}]}}') for at in (0, 8, 24, 40, 72)),
    *(Raw(text) for text in ('{"format":"pt"}', '{"a":1}', '{"a":null}', '[["a","b"]]', '{"a":"b","a":"c"}')),
]


def tensors() -> bytes:
    """Every dtype, a scalar, an empty tensor and a rotary buffer, with metadata."""
    torch.manual_seed(0)
    state = {
        "model.embed_tokens.weight": torch.randn(2, 3),
        "model.layers.0.mlp.up_proj.weight": torch.randn(3, 2).half(),
        "model.layers.0.mlp.down_proj.weight": torch.randn(2, 3).bfloat16(),
        "model.norm.weight": torch.randn(3, dtype=torch.float64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(2),
        "scale": torch.tensor(2.5),
        "none": torch.zeros(0, 4, dtype=torch.bfloat16),
    }
    return save(state, {"format": "pt", "note": "\u00fc"})


def plain() -> bytes:
    """Without metadata; two tensors of the same size."""
    torch.manual_seed(1)
    return save({"lm_head.weight": torch.randn(2, 3), "model.embed_tokens.weight": torch.randn(2, 3)})


def ours(folder: Path) -> bytes:
    infos = {"a": TensorInfo((2, 3), np.dtype(np.float32)), "b": TensorInfo((4,), np.dtype(np.float16))}
    writer = SafetensorsWriter(folder / "ours.safetensors", infos)
    for name, info in infos.items():
        writer.write(name, np.arange(np.prod(info.shape)).astype(info.dtype))
    writer.close()
    return (folder / "ours.safetensors").read_bytes()


def read_all(source: CheckpointSource) -> dict[str, np.ndarray]:
    arrays = {name: np.zeros(info.shape, info.dtype) for name, info in source.tensors.items()}
    for name, array in arrays.items():
        source.read(name, tuple(slice(None) for _ in array.shape), array)
    return arrays


def verdict(folder: Path, data: bytes) -> str:
    """Reads a damaged file and, when that succeeds, compares every value with what the library reads."""
    file = folder / "model.safetensors"
    file.write_bytes(data)
    with guarded(len(data)):
        try:
            arrays = read_all(open_safetensors(folder))
        except CheckpointError as e:
            return "refused" if str(e).startswith(f"{file}: ") else f"refused without naming the file: {e}"
    with safe_open(file, "pt") as reference:  # a refusal here is a failure, too
        expected = {name: reference.get_tensor(name) for name in reference.keys()}  # noqa: SIM118
    names = [name for name in expected if not name.endswith("rotary_emb.inv_freq")]
    assert arrays.keys() == {to_canonical(name, HF_NAMES) for name in names}
    assert len(arrays) == len(names)
    for name in names:
        assert_bits_equal(arrays[to_canonical(name, HF_NAMES)], to_numpy(expected[name]))
    return "read"


def run(request: pytest.FixtureRequest, strategy: SearchStrategy, judge: Callable[..., str]) -> None:
    """Judges the examples of a strategy. Both verdicts must occur, or the damage does not test anything."""
    verdicts: Counter[str] = Counter()

    @fuzz_settings(request)
    @given(strategy)
    def check(example: object) -> None:
        verdicts[judge(example)] += 1

    check()
    assert verdicts.keys() == {"read", "refused"}, verdicts


def header_of(data: bytes) -> tuple[bytes, bytes]:
    """The JSON text of a file, and the bytes of its tensors."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def with_header(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def test_undamaged_files_are_read(tmp_path: Path):
    for data in (tensors(), plain(), ours(tmp_path)):
        assert verdict(tmp_path, data) == "read"


def test_damage_anywhere(request: pytest.FixtureRequest, tmp_path: Path):
    sources = st.sampled_from([tensors(), plain(), ours(tmp_path)])
    run(request, sources.flatmap(mutated), lambda data: verdict(tmp_path, data))


def test_two_files_spliced(request: pytest.FixtureRequest, tmp_path: Path):
    sources = st.permutations([tensors(), plain(), ours(tmp_path)])
    run(request, sources.flatmap(lambda files: spliced(files[0], files[1])), lambda data: verdict(tmp_path, data))


def test_damage_to_the_bytes_of_the_header(request: pytest.FixtureRequest, tmp_path: Path):
    def damage(source: bytes) -> SearchStrategy[bytes]:
        text, data = header_of(source)
        return mutated(text.rstrip()).map(lambda text: with_header(text, data))

    sources = st.sampled_from([tensors(), plain(), ours(tmp_path)])
    run(request, sources.flatmap(damage), lambda data: verdict(tmp_path, data))


def test_damage_to_what_the_header_says(request: pytest.FixtureRequest, tmp_path: Path):
    def damage(source: bytes) -> SearchStrategy[bytes]:
        text, data = header_of(source)
        return mutated_json(text, HEADER_VALUES).map(lambda text: with_header(text, data))

    sources = st.sampled_from([tensors(), plain(), ours(tmp_path)])
    run(request, sources.flatmap(damage), lambda data: verdict(tmp_path, data))


@st.composite
def laid_out(draw: DrawFn) -> bytes:
    """A file whose tensors follow one another, in any order of the header, but for a slip now and then."""
    widths = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F32 ": 4, "I16": 2}
    entries, end = [], 0
    for i in range(draw(st.integers(0, 5))):
        code = draw(st.sampled_from([*widths][:4] * 4 + [*widths]))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        begin, end = end, end + int(np.prod(shape)) * widths[code]
        slip = draw(st.sampled_from([None] * 10 + ["shape", "begin", "end", "both", "name"]))
        by = draw(st.sampled_from([-8, -2, -1, 1, 2, 8]))
        at = [begin + by * (slip in ("begin", "both")), end + by * (slip in ("end", "both"))]
        shape = [*shape, 1 + (by > 1)] if slip == "shape" else shape
        name = "t0" if slip == "name" else f"t{i}"
        entries.append(f'"{name}":{{"dtype":"{code}","shape":{shape},"data_offsets":{at}}}')
    entries.append(
        draw(st.sampled_from(['"__metadata__":{"format":"pt"}', '"__metadata__":null', '"t":[]', '"t0":{}']))
    )
    kept = len(entries) if draw(st.booleans()) else len(entries) - 1
    text = "{" + ",".join(draw(st.permutations(entries[:kept]))) + "}" + " " * draw(st.integers(0, 3))
    slack = draw(st.sampled_from([0] * 12 + [-1, 1]))
    return with_header(text.encode(), bytes(i % 251 for i in range(max(0, end + slack))))


def test_layouts(request: pytest.FixtureRequest, tmp_path: Path):
    run(request, laid_out(), lambda data: verdict(tmp_path, data))


ENTRY = '{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
# Headers that the library refuses, and those (the second part) that it reads in its own way.
REFUSED = {
    "zeros after": f'{{"a":{ENTRY}}}\0\0',
    "a name twice in an entry": f'{{"a":{{"dtype":"F32",{ENTRY[1:]}}}',
    "metadata twice": f'{{"__metadata__":{{}},"__metadata__":null,"a":{ENTRY}}}',
    "a number in metadata": f'{{"__metadata__":{{"a":1}},"a":{ENTRY}}}',
    "a list of metadata": f'{{"__metadata__":[],"a":{ENTRY}}}',
    "an entry as metadata": f'{{"__metadata__":{ENTRY},"a":{ENTRY}}}',
    "minus zero": '{"a":{"dtype":"F32","shape":[4],"data_offsets":[-0,16]}}',
    "a number beyond float64": f'{{"a":{{"x":1e999,{ENTRY[1:]}}}',
    "not a number": f'{{"a":{{"x":NaN,{ENTRY[1:]}}}',
    "half of a character": f'{{"\\ud800":{ENTRY}}}',
    "half of a character in metadata": f'{{"__metadata__":{{"a":"\\udc00"}},"a":{ENTRY}}}',
    "a product beyond 64 bits": f'{{"e":{{"dtype":"F32","shape":[{2**40},{2**40},0],"data_offsets":[0,0]}},'
    f'"a":{ENTRY}}}',
    "an axis beyond 64 bits": f'{{"a":{ENTRY},"e":{{"dtype":"F32","shape":[0,{2**64}],"data_offsets":[0,0]}}}}',
    "space before": f' {{"a":{ENTRY}}}',
    "a tensor twice": f'{{"a":{ENTRY},"a":{ENTRY}}}',
    "a tensor twice, once escaped": f'{{"a":{ENTRY},"\\u0061":{ENTRY}}}',
    "metadata with a name twice": f'{{"__metadata__":{{"a":"b","a":"c"}},"a":{ENTRY}}}',
    "another field": f'{{"a":{{"x":1,{ENTRY[1:]}}}',
    "nested": f'{{"a":{{"x":{"[" * 120 + "]" * 120},{ENTRY[1:]}}}',
    "an array as entry": '{"a":["F32",[4],[0,16]]}',
    "many axes": f'{{"a":{{"dtype":"F32","shape":[{"1," * 60}4],"data_offsets":[0,16]}}}}',
}


@pytest.mark.parametrize("header", REFUSED.values(), ids=REFUSED)
def test_as_strict_as_the_library(tmp_path: Path, header: str):
    put_together(tmp_path / "model.safetensors", f'{{"a":{ENTRY}}} '.encode(), bytes(16))
    assert open_safetensors(tmp_path).tensors["a"].shape == (4,)
    put_together(tmp_path / "model.safetensors", header.encode(), bytes(16))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("depth", range(900, 1000, 4))
def test_an_entry_nested_as_deeply_as_can_be_parsed(tmp_path: Path, depth: int):
    put_together(tmp_path / "model.safetensors", b'{"a":' + b"[" * depth + b"]" * depth + b"}", b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (its header is not JSON|tensor a has a malformed)"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("place", "item"),
    [(b"[%b0]", b'{"":{}},'), (b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[%b1]}}', b"100,")],
    ids=["objects", "numbers"],
)
def test_the_largest_header_takes_bounded_memory_and_time(tmp_path: Path, place: bytes, item: bytes):
    text = place % (item * ((safetensors.MAX_HEADER_BYTES - len(place)) // len(item)))
    put_together(tmp_path / "model.safetensors", text, b"")
    del text
    with guarded(safetensors.MAX_HEADER_BYTES), pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        open_safetensors(tmp_path)


def test_a_header_or_index_beyond_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model.safetensors").write_bytes(plain())
    (tmp_path / INDEX).write_text('{"weight_map": {"norm": "model.safetensors"}}')
    monkeypatch.setattr(safetensors, "MAX_HEADER_BYTES", 40)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not a safetensors file: .* header length"):
        open_safetensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json: is not an index: .*more than 40 bytes"):
        open_safetensors(tmp_path)


# --- the index

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
FILES = [
    *(*SHARDS, *SHARDS, "link.safetensors", "linked-outside.safetensors", "dangling.safetensors", "loop.safetensors"),
    *("folder.safetensors", "folder.safetensors/x.safetensors", "../outside.safetensors", "./link.safetensors", ".."),
    *("", "/", "\0.safetensors", "a\0.safetensors", "x" * 300 + ".safetensors", "\U0001f600.safetensors", INDEX),
    *("other.safetensors", SHARDS[0].upper(), SHARDS[0] + "/", "absent.safetensors", "C:\\x.safetensors"),
    *(
        "weight_map",
        "metadata",
        "model.norm.weight",
        "norm",
        "model.layers.0.mlp.up_proj.weight",
        "rotary_emb.inv_freq",
    ),
]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of three shards, with files of all kinds in and beside it."""
    torch.manual_seed(0)
    folder = tmp_path / "sharded"
    folder.mkdir()
    states = [
        {"model.embed_tokens.weight": torch.randn(3, 2), "model.norm.weight": torch.randn(3)},
        {f"model.layers.0.mlp.{name}_proj.weight": torch.randn(2, 3).half() for name in ("up", "down", "gate")},
        {"lm_head.weight": torch.randn(3, 2).bfloat16(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
    ]
    for file, state in zip(SHARDS, states, strict=True):
        save_file(state, folder / file)
    weight_map = {name: file for file, state in zip(SHARDS, states, strict=True) for name in state}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 93}, "weight_map": weight_map}))
    (folder / "link.safetensors").symlink_to(SHARDS[1])
    save_file(states[0], tmp_path / "apart.safetensors")
    (folder / "linked-outside.safetensors").symlink_to("../apart.safetensors")  # as the hub's cache has them
    save_file({name: x + 1 for state in states for name, x in state.items()}, tmp_path / "outside.safetensors")
    (folder / "dangling.safetensors").symlink_to("gone.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "folder.safetensors").mkdir()
    save_file({"other": torch.ones(2)}, folder / "other.safetensors")
    return folder


@st.composite
def damaged_folders(draw: DrawFn, index: bytes) -> tuple[bytes, list[tuple[str, str, int]]]:
    """A damaged index, and in one of four folders something done to a shard."""
    if draw(st.integers(0, 3)):
        return draw(damaged_json(index, [*FILES, "/outside.safetensors"])), []
    deed = st.tuples(
        st.sampled_from(SHARDS),
        st.sampled_from(["remove", "truncate", "add", "outside", *SHARDS]),
        st.integers(0, 300),
    )
    return index, draw(st.lists(deed, min_size=1, max_size=2))


def test_damage_to_an_index_or_its_shards(request: pytest.FixtureRequest, sharded: Path):
    expected = {name: array.copy() for name, array in read_all(open_safetensors(sharded)).items()}
    assert len(expected) == 6
    index = (sharded / INDEX).read_bytes()
    files = {file: (sharded / file).read_bytes() for file in SHARDS}

    def judge(example: tuple[bytes, list[tuple[str, str, int]]]) -> str:
        text, deeds = example
        (sharded / INDEX).write_bytes(text)
        for file, deed, count in deeds:
            tamper(sharded / file, deed, count)
        with guarded(len(text)):
            try:
                arrays = read_all(open_safetensors(sharded))
            except CheckpointError as e:
                arrays, message = None, str(e)
        for file, _, _ in deeds:
            (sharded / file).unlink(missing_ok=True)
            (sharded / file).write_bytes(files[file])
        if arrays is None:
            return "refused" if message.startswith(str(sharded)) else f"refused without naming the file: {message}"
        for name, array in arrays.items():
            assert_bits_equal(array, expected[name])
        return "read"

    run(request, damaged_folders(index), judge)


def tamper(shard: Path, deed: str, count: int) -> None:
    data = shard.read_bytes() if shard.exists() else b""
    shard.unlink(missing_ok=True)
    match deed:
        case "truncate":
            shard.write_bytes(data[:count])
        case "add":
            shard.write_bytes(data + bytes(count))
        case "outside":  # the same tensors, through a link
            outside = shard.parent.parent / "moved.safetensors"
            outside.write_bytes(data)
            shard.symlink_to(outside)
        case name if name in SHARDS and name != shard.name and shard.with_name(name).is_file():
            shutil.copy(shard.with_name(name), shard)


def test_an_index_names_no_path(sharded: Path):
    for path in (
        str(sharded.parent / "outside.safetensors"),
        "../outside.safetensors",
        "folder.safetensors/x.safetensors",
    ):
        (sharded / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": path}}))
        with pytest.raises(CheckpointError, match="weight_map names"):
            open_safetensors(sharded)


@pytest.mark.parametrize("file", ["x" * 300, "a\0", "loop", "dangling", "folder"], ids=["long", "zero", *"ldf"])
def test_an_index_names_what_is_no_file(sharded: Path, file: str):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": f"{file}.safetensors"}}))
    with pytest.raises(CheckpointError, match="1 of 1 shards missing"):
        open_safetensors(sharded)
