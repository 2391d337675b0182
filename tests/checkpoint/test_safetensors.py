"""The safetensors format: names, headers, and reading slices; every way a file can be broken."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hf_models import CONFIG, assert_bits_equal, put_together, save_random_model, take_apart
from safetensors.torch import save_file

from sharded_llama.checkpoint import files, open_checkpoint
from sharded_llama.checkpoint.hf import safetensors
from sharded_llama.checkpoint.layout import canonical_shapes
from sharded_llama.checkpoint.names import HF_NAMES, META_NAMES, to_canonical, to_stored
from sharded_llama.errors import CheckpointError

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    save_random_model(folder, CONFIG)
    return folder


@pytest.fixture
def broken(single: Path, tmp_path: Path) -> Path:
    """A copy of the weights to break."""
    (tmp_path / "model.safetensors").write_bytes((single / "model.safetensors").read_bytes())
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_random_model(tmp_path, CONFIG, max_shard_size="60KB")
    return tmp_path


def test_names_go_both_ways():
    names = list(canonical_shapes(CONFIG.replace(n_layers=12)))
    for table in (HF_NAMES, META_NAMES):
        assert [to_canonical(to_stored(name, table), table) for name in names] == names
        assert len({to_stored(name, table) for name in names}) == len(names)
    assert to_stored("layers.11.w2", HF_NAMES) == "model.layers.11.mlp.down_proj.weight"
    assert to_stored("layers.11.w2", META_NAMES) == "layers.11.feed_forward.w2.weight"


@pytest.mark.parametrize("name", ["model.layers.3.self_attn.q_proj.bias", "model.layers.x.mlp.up_proj.weight", "score"])
def test_unknown_names_stay_as_they_are(name: str):
    assert to_canonical(name, HF_NAMES) == name
    assert to_stored(name, HF_NAMES) == name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_lists_what_transformers_saved(tmp_path: Path, dtype: str):
    config = CONFIG.replace(dtype=dtype)
    save_random_model(tmp_path, config)
    source = open_checkpoint(tmp_path)
    assert {name: info.shape for name, info in source.tensors.items()} == canonical_shapes(config)
    assert {info.dtype for info in source.tensors.values()} == {np.dtype(config.jnp_dtype)}


SLICES = {
    "whole": (slice(None), slice(None)),
    "rows": (slice(5, 17), slice(None)),
    "columns": (slice(None), slice(8, 40)),
    "box": (slice(3, 60), slice(1, 2)),
    "nothing": (slice(4, 4), slice(0, 3)),
}


@pytest.mark.parametrize("slices", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_reads_any_slice(tmp_path, monkeypatch, stored_dtype, out_dtype, slices, strided):
    monkeypatch.setattr(files, "MAPPED_BYTES", 1000)  # several mappings even here
    tensor = torch.randn(64, 96).to(getattr(torch, stored_dtype))
    # An odd byte before it: nothing says that tensors are aligned.
    save_file({"w": tensor}, tmp_path / "aligned.safetensors")
    header, data = take_apart(tmp_path / "aligned.safetensors")
    text = json.dumps(header).encode()
    put_together(tmp_path / "model.safetensors", text + b" " * ((len(text) + 1) % 2), data)

    source = open_checkpoint(tmp_path)
    expected = tensor.float().numpy().astype(safetensors.DTYPES[_code(stored_dtype)])[slices]
    expected = expected.astype(safetensors.DTYPES[_code(out_dtype)])
    wide = np.zeros((expected.shape[0], expected.shape[1] + 7), expected.dtype)
    out = wide[:, 3:-4] if strided else np.zeros_like(expected)
    assert source.read("w", slices, out) == expected.size * tensor.element_size()
    assert_bits_equal(out, expected)
    assert not strided or not (wide[:, :3].any() or wide[:, -4:].any())


def _code(dtype: str) -> str:
    return {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]


def test_reads_vectors_with_conversion(single: Path):
    source = open_checkpoint(single)
    whole, part = np.zeros(64, np.float32), np.zeros(16, ml_dtypes.bfloat16)
    source.read("norm", (slice(None),), whole)
    source.read("norm", (slice(16, 32),), part)
    assert whole.any()
    assert_bits_equal(part, whole[16:32].astype(ml_dtypes.bfloat16))


def test_short_reads_are_continued(single: Path, monkeypatch: pytest.MonkeyPatch):
    source, real = open_checkpoint(single), safetensors.os.preadv
    expected, out = np.zeros((131, 64), np.float32), np.zeros((131, 64), np.float32)
    source.read("output", (slice(None), slice(None)), expected)
    monkeypatch.setattr(safetensors.os, "preadv", lambda fd, views, offset: real(fd, [views[0][:1000]], offset))
    source.read("output", (slice(None), slice(None)), out)
    assert expected.all()
    assert_bits_equal(out, expected)


def test_out_of_the_wrong_shape_is_a_bug(single: Path):
    with pytest.raises(ValueError, match=r"\(3, 64\)"):
        open_checkpoint(single).read("output", (slice(0, 4), slice(None)), np.zeros((3, 64), np.float32))


def test_rotary_buffers_are_ignored(broken: Path):
    _add_tensor(broken, "model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (6,))
    assert set(open_checkpoint(broken).tensors) == set(canonical_shapes(CONFIG))


def test_an_unknown_tensor_keeps_its_name(broken: Path):
    _add_tensor(broken, "model.layers.0.self_attn.q_proj.bias", "F32", (96,))
    source = open_checkpoint(broken)
    assert source.tensors["model.layers.0.self_attn.q_proj.bias"].shape == (96,)


@pytest.mark.parametrize("kept", [0, 5, 100, 40_000, -1])
def test_a_truncated_file(broken: Path, kept: int):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is (truncated|not a safetensors file)"):
        open_checkpoint(broken)


@pytest.mark.parametrize("slices", [(slice(None), slice(None)), (slice(None), slice(0, 5))], ids=["rows", "columns"])
def test_a_file_truncated_after_it_was_opened(broken: Path, slices: tuple[slice, slice]):
    source = open_checkpoint(broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])
    out = np.zeros((96, 64), np.float32)[slices]
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: cannot read tensor {Q_PROJ}"):
        source.read("layers.1.wq", slices, out)


def test_a_file_that_goes_on_after_its_tensors(broken: Path):
    with open(broken / "model.safetensors", "ab") as f:
        f.write(b"more")
    with pytest.raises(CheckpointError, match="but its tensors end at"):
        open_checkpoint(broken)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json", "header is not JSON"),
        (b"\xff\xfe{}", "header is not JSON"),
        (b"[" * 100_000, "header is not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b"", "header is not JSON"),
    ],
    ids=["text", "bytes", "nested", "list", "empty"],
)
def test_a_corrupt_header(tmp_path: Path, header: bytes, message: str):
    put_together(tmp_path / "model.safetensors", header, b"")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        open_checkpoint(tmp_path)


def test_an_absurd_header_length_asks_for_no_memory(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F8_E4M3"}, "dtype F8_E4M3, which is not supported"),
        ({"dtype": "I64"}, "dtype I64, which is not supported"),
        ({"dtype": ["F32"]}, "malformed"),
        ({"shape": [96, 65]}, r"needs 24960 bytes, but the header gives it 24576"),
        ({"shape": [-96, -64]}, "malformed"),
        ({"shape": [96.0, 64]}, "malformed"),
        ({"data_offsets": [0]}, "malformed"),
        ({"data_offsets": None}, "malformed"),
        ({"data_offsets": [10**15, 10**15 + 96 * 64 * 4]}, "ends at byte"),
    ],
)
def test_a_wrong_header_entry(broken: Path, change: dict, message: str):
    header, data = take_apart(broken / "model.safetensors")
    header[Q_PROJ] |= change
    put_together(broken / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*tensor {Q_PROJ} .*{message}"):
        open_checkpoint(broken)


def test_tensors_that_overlap(broken: Path):
    header, data = take_apart(broken / "model.safetensors")
    k_proj, v_proj = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "kv")
    header[k_proj]["data_offsets"] = header[v_proj]["data_offsets"]
    put_together(broken / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match="begins at byte"):
        open_checkpoint(broken)


def test_shards_hold_every_tensor(sharded: Path):
    assert len(list(sharded.glob("*.safetensors"))) > 3
    source = open_checkpoint(sharded)
    assert {name: info.shape for name, info in source.tensors.items()} == canonical_shapes(CONFIG)


def test_a_missing_shard_is_named(sharded: Path):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"1 of \d+ shards missing: {file.name}"):
        open_checkpoint(sharded)


def test_a_shard_without_its_tensor(sharded: Path):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    file = index["weight_map"][Q_PROJ]
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = file
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"{file}: lacks .*model\.layers\.7\.mlp\.up_proj\.weight"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "path", ["../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", "..", "", "config.json", 3]
)
def test_an_index_stays_in_its_folder(sharded: Path, path: str):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"][Q_PROJ] = path
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    (sharded.parent / "secret.safetensors").write_bytes(b"not to be read")
    with pytest.raises(CheckpointError, match=rf"weight_map names {path!r}"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": ["y"]}}', "[" * 100_000])
def test_a_corrupt_index(tmp_path: Path, text: str):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: is not an index"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("other.pth", "not as Meta names them"),
        ("pytorch_model.bin", "pickled PyTorch weights"),
        ("pytorch_model-00001-of-00002.bin", "pickled PyTorch weights"),
        ("model.gguf", "GGUF"),
        ("config.json", r"neither model\.safetensors nor"),
    ],
)
def test_folders_of_other_formats(tmp_path: Path, file: str, message: str):
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"absent: cannot be read as a checkpoint folder: No such file"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        open_checkpoint(tmp_path / "file")
    (tmp_path / "model.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: No such file"):
        open_checkpoint(tmp_path)


def _add_tensor(folder: Path, name: str, code: str, shape: tuple[int, ...]) -> None:
    header, data = take_apart(folder / "model.safetensors")
    array = np.zeros(shape, safetensors.DTYPES[code])
    header[name] = {"dtype": code, "shape": shape, "data_offsets": [len(data), len(data) + array.nbytes]}
    put_together(folder / "model.safetensors", header, data + array.tobytes())


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not a regular file"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "params.json")
    (tmp_path / "consolidated.00.pth").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"params\.json is not a regular file of"):
        open_checkpoint(tmp_path)
    (tmp_path / "params.json").unlink()
    (tmp_path / "params.json").write_text('{"dim": 8, "n_heads": 2, "n_layers": 1}')
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: is not a regular file"):
        open_checkpoint(tmp_path)


def test_no_tensors_and_wrong_names(single: Path, broken: Path, tmp_path: Path):
    header, data = take_apart(broken / "model.safetensors")
    header["norm"] = header.pop("model.norm.weight")
    put_together(broken / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=r"tensor norm should be called model\.norm\.weight"):
        open_checkpoint(broken)
    put_together(broken / "model.safetensors", {}, b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: holds no tensors"):
        open_checkpoint(broken)
