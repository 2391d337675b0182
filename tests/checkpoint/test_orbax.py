"""Orbax items: read as orbax saved them; what the writer streams, orbax restores; incomplete ones are refused."""

import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from hf_models import CONFIG, assert_bits_equal
from jax.sharding import NamedSharding, PartitionSpec as P
from orbax_items import LAYOUTS, Tensors, change_json, crc32c, flat, nested, random_tensors, save_item

from sharded_llama.checkpoint import open_checkpoint
from sharded_llama.checkpoint.hf.writer import to_hf_dict
from sharded_llama.checkpoint.orbax import keys as orbax_keys, writer as orbax_save, zarr as orbax_zarr
from sharded_llama.checkpoint.orbax.source import OrbaxSource, is_orbax, open_orbax
from sharded_llama.checkpoint.orbax.writer import OrbaxWriter, chunk_shape
from sharded_llama.checkpoint.source import TensorInfo
from sharded_llama.errors import CheckpointError
from sharded_llama.json_file import write_json
from sharded_llama.mesh import make_mesh

TENSORS = random_tensors()
SLICES = [
    (slice(0, 48), slice(0, 32)),
    (slice(5, 41), slice(0, 32)),
    (slice(0, 48), slice(3, 9)),
    (slice(7, 7), slice(0, 32)),
]


@pytest.fixture(scope="module", params=LAYOUTS)
def item(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "item"
    save_item(folder, TENSORS, request.param)
    return folder


@pytest.fixture
def broken(item: Path, tmp_path: Path) -> Path:
    """A copy of an item, to be damaged."""
    return Path(shutil.copytree(item, tmp_path / "item"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """An item of plain files in zarr 2, as `OrbaxWriter` makes them."""
    save_item(tmp_path / "item", TENSORS, "files")
    return tmp_path / "item"


def read_all(source: OrbaxSource) -> Tensors:
    read = {}
    for name, info in source.tensors.items():
        read[name] = np.empty(info.shape, info.dtype)
        assert source.read(name, tuple(slice(0, n) for n in info.shape), read[name]) == info.nbytes
    return read


def try_to_read(folder: Path) -> tuple[Tensors, str]:
    """The tensors, or why they cannot be read."""
    try:
        return read_all(open_checkpoint(folder)), ""
    except CheckpointError as e:
        return {}, str(e)


def assert_tensors_equal(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bits_equal(actual[name], tensor)


def test_reads_what_orbax_saved(item: Path):
    source = open_orbax(item)
    assert len([key for key in source.tensors["tok_embeddings"].values if not key.startswith((".z", "zarr"))]) > 3
    assert_tensors_equal(read_all(source), TENSORS)


def test_uncompressed(tmp_path: Path):
    for layout in LAYOUTS:
        save_item(tmp_path / layout, TENSORS, layout, compress=False)
        source = open_orbax(tmp_path / layout)
        assert not source.tensors["norm"].array.zstd
        assert_tensors_equal(read_all(source), TENSORS)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_slices_are_converted(item: Path, dtype: type):
    source = open_orbax(item)
    for slices in SLICES:
        expected = TENSORS["layers.0.wq"][slices].astype(dtype)
        out = np.full((expected.shape[1], expected.shape[0]), 9, dtype).T  # strided
        assert source.read("layers.0.wq", slices, out) == expected.size * 2
        assert_bits_equal(np.ascontiguousarray(out), expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_stored_dtypes(tmp_path: Path, dtype: type):
    tensors = random_tensors(dtype)
    for layout in LAYOUTS:
        save_item(tmp_path / layout, tensors, layout)
        assert_tensors_equal(read_all(open_orbax(tmp_path / layout)), tensors)


def test_only_the_chunks_of_a_slice_are_read(files: Path):
    """Others may be damaged."""
    source = open_orbax(files)
    array = source.tensors["tok_embeddings"].array
    assert array.grid[0] > 3
    rows = array.chunk[0]
    for key in ("0.0", "2.0"):
        (files / "tok_embeddings" / key).write_bytes(b"damaged")
    out = np.empty((rows, 32), ml_dtypes.bfloat16)
    source.read("tok_embeddings", (slice(rows, 2 * rows), slice(0, 32)), out)
    assert_bits_equal(out, TENSORS["tok_embeddings"][rows : 2 * rows])
    for start in (rows - 1, rows + 1):
        with pytest.raises(CheckpointError, match=r"item: chunk [02]\.0 of tensor tok_embeddings: is damaged"):
            source.read("tok_embeddings", (slice(start, start + rows), slice(0, 32)), out)


def test_many_threads(item: Path):
    source = open_orbax(item)
    jobs = [(name, row) for name in TENSORS for row in range(0, len(TENSORS[name]), 7)] * 3

    def read(job: tuple[str, int]) -> np.ndarray:
        name, row = job
        slices = (slice(row, min(row + 7, len(TENSORS[name]))), *(slice(0, n) for n in TENSORS[name].shape[1:]))
        out = np.empty(TENSORS[name][slices].shape, TENSORS[name].dtype)
        source.read(name, slices, out)
        return out

    with ThreadPoolExecutor(8) as pool:
        for (name, row), out in zip(jobs, pool.map(read, jobs), strict=True):
            assert_bits_equal(out, TENSORS[name][row : row + 7])


def test_out_must_have_the_shape_of_the_slices(item: Path):
    with pytest.raises(ValueError, match=r"out has shape \(3, 32\), the slices have \(2, 32\)"):
        open_orbax(item).read("layers.0.wq", (slice(0, 2), slice(0, 32)), np.empty((3, 32), np.float32))


def test_where_the_config_stands(item: Path, tmp_path: Path):
    """In the checkpoint folder, in the item, or beside it."""
    folder = tmp_path / "model"
    shutil.copytree(item, folder / "weights")
    write_json(folder / "config.json", to_hf_dict(CONFIG))
    for opened in (folder, folder / "weights"):
        source = open_checkpoint(opened)
        assert (source.format, source.location, source.read_config()) == ("orbax", str(opened), CONFIG)
        assert source.tensors.keys() == TENSORS.keys()
    (folder / "config.json").rename(folder / "weights" / "config.json")
    assert open_checkpoint(folder / "weights").read_config() == CONFIG


def test_a_tree_with_lists(tmp_path: Path):
    """Layers in a list have the same names."""
    layer = {"wq": np.ones((2, 3), np.float32)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "item", {"layers": [layer, layer], "empty": {}, "norm": np.ones(3, np.float32)})
    assert_tensors_equal(
        read_all(open_orbax(tmp_path / "item")),
        {"layers.0.wq": layer["wq"], "layers.1.wq": layer["wq"], "norm": np.ones(3, np.float32)},
    )


def test_a_scalar(tmp_path: Path):
    for layout in LAYOUTS:
        save_item(tmp_path / layout, {"scale": np.array(3.5, np.float32)}, layout)
        assert_tensors_equal(read_all(open_orbax(tmp_path / layout)), {"scale": np.array(3.5, np.float32)})


def test_a_tree_with_something_else(tmp_path: Path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "item", {"norm": np.ones(3, np.float32), "step": 3})
    with pytest.raises(CheckpointError, match=r"_METADATA: step is a 'scalar'; arrays are expected"):
        open_orbax(tmp_path / "item")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "ints", {"norm": np.ones(3, np.int32)})
    with pytest.raises(CheckpointError, match=r"\.zarray of tensor norm: .*dtype '<i4' is not of"):
        open_orbax(tmp_path / "ints")


# Incomplete checkpoints.


def test_temporary_folders(item: Path, tmp_path: Path):
    for name in ("model.orbax-checkpoint-tmp", "model.orbax-checkpoint-tmp-123"):
        shutil.copytree(item, tmp_path / name / "weights")
        for folder in (tmp_path / name, tmp_path / name / "weights"):
            assert is_orbax(folder)
            with pytest.raises(CheckpointError, match="is the temporary folder of a save that was not finished"):
                open_checkpoint(folder)
    (tmp_path / "model" / "weights.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match=r"_METADATA is missing.*weights\.orbax-checkpoint-tmp is what a save left"
    ):
        open_checkpoint(tmp_path / "model")


def test_not_committed(broken: Path):
    change_json(broken / "_CHECKPOINT_METADATA", lambda x: x.update(commit_timestamp_nsecs=None))
    with pytest.raises(CheckpointError, match=r"_CHECKPOINT_METADATA: the checkpoint was not finished"):
        open_orbax(broken)
    (broken / "_CHECKPOINT_METADATA").unlink()  # as older versions leave it
    assert_tensors_equal(read_all(open_orbax(broken)), TENSORS)


def test_every_file_is_needed(item: Path, tmp_path: Path):
    """Without any one of the files that hold tensors or describe them, a checkpoint is refused and never zeros."""
    optional = {"_CHECKPOINT_METADATA", "commit_success.txt", "_sharding"}
    refused = 0
    for i, path in enumerate(sorted(p for p in item.rglob("*") if p.is_file())):
        relative = path.relative_to(item)
        copy = Path(shutil.copytree(item, tmp_path / str(i)))
        (copy / relative).unlink()
        tensors, error = try_to_read(copy)
        if error:
            assert str(copy) in error
            assert "incomplete" in error
            refused += 1
        else:  # the database of a process is merged into one: only its data files matter
            assert relative.name in optional or relative.parts[0] in ("ocdbt.process_0", "array_metadatas"), relative
            assert_tensors_equal(tensors, TENSORS)
    assert refused >= 3


def test_every_truncated_file_is_noticed(item: Path, tmp_path: Path):
    for i, path in enumerate(sorted(p for p in item.rglob("*") if p.is_file() and p.stat().st_size)):
        copy = Path(shutil.copytree(item, tmp_path / str(i)))
        os.truncate(copy / path.relative_to(item), path.stat().st_size - 1)
        tensors, error = try_to_read(copy)
        if error:
            assert str(copy) in error
        else:
            assert_tensors_equal(tensors, TENSORS)


@pytest.mark.parametrize("length", range(12))
def test_a_chunk_of_a_few_bytes(files: Path, length: int):
    os.truncate(files / "tok_embeddings" / "1.0", length)
    tensors, error = try_to_read(files)
    assert not tensors
    assert "tok_embeddings" in error


def test_a_missing_chunk_is_named(files: Path):
    (files / "tok_embeddings" / "1.0").unlink()
    with pytest.raises(CheckpointError, match=r"item: tensor tok_embeddings has 4 of 5 chunks: .* incomplete"):
        open_orbax(files)
    (files / "tok_embeddings" / "9.0").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tok_embeddings lacks 1 of 5 chunks: 1\.0: .* incomplete"):
        open_orbax(files)


def test_old_checkpoints_leave_zeros_out(files: Path):
    """Without the flag in its metadata, a chunk that is missing is zero, to orbax and here."""
    change_json(files / "_METADATA", lambda x: x.pop("store_array_data_equal_to_fill_value") and None)
    (files / "norm" / "0").unlink()
    assert_tensors_equal(read_all(open_orbax(files)), TENSORS)
    assert_tensors_equal(flat(ocp.StandardCheckpointer().restore(files)), TENSORS)


def test_a_missing_part_of_a_zarr3_chunk(tmp_path: Path):
    """The index within a chunk says what it lacks."""
    save_item(tmp_path / "item", TENSORS, "files-zarr3")
    file = tmp_path / "item" / "layers.0.wq" / "c" / "0" / "0"
    spec = {"driver": "zarr3", "kvstore": f"file://{tmp_path}/item/layers.0.wq/"}
    store = ts.open(spec).result()
    rows = store.chunk_layout.write_chunk.shape[0]
    store[:rows].write(np.zeros((rows, 32), ml_dtypes.bfloat16)).result()  # not stored, as it equals the fill value
    file.write_bytes(struct.pack("<QQ", 2**64 - 1, 2**64 - 1))
    index = file.read_bytes()
    file.write_bytes(index + crc32c(index).to_bytes(4, "little"))
    out = np.empty((rows, 32), ml_dtypes.bfloat16)
    with pytest.raises(
        CheckpointError, match=r"chunk c/0/0 of tensor layers\.0\.wq: is damaged: part 0 of 1 is missing"
    ):
        open_orbax(tmp_path / "item").read("layers.0.wq", (slice(0, rows), slice(0, 32)), out)
    assert not store[:rows].read().result().any()  # what tensorstore makes of it


# Hostile metadata.


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shape", [10**18, 10**18], "larger than any array"),
        ("shape", [10**15, 32], "5 of .* chunks"),
        ("shape", [-1, 32], "sizes of 0 or more"),
        ("shape", [1.5, 32], "sizes of 0 or more"),
        ("shape", [130], "differ in rank"),
        ("shape", [1] * 40, "up to 8 sizes"),
        ("chunks", [2**40, 32], "bytes each, but at most"),
        ("chunks", [0, 32], "sizes of 1 or more"),
        ("chunks", None, "sizes of 1 or more"),
        ("dtype", "|O", r"dtype '\|O' is not of"),
        ("dtype", [["x", "<f4"]], "is not of"),
        ("compressor", {"id": "blosc"}, "neither zstd nor none"),
        ("compressor", 3, "TypeError"),
        ("filters", [{"id": "delta"}], "filters are not supported"),
        ("order", "F", "order C"),
        ("zarr_format", 3, "zarr_format must be 2"),
        ("dimension_separator", "/../", "neither . nor /"),
    ],
)
def test_array_descriptions(files: Path, field: str, value: object, message: str):
    change_json(files / "tok_embeddings" / ".zarray", lambda x: x.update({field: value}))
    with pytest.raises(CheckpointError, match=rf"item.*\.zarray of tensor tok_embeddings.*{message}|{message}"):
        open_orbax(files)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("codecs",), [{"name": "gzip"}], "little endian"),
        (("codecs", 0, "configuration", "codecs", 1, "name"), "blosc", "are not bytes"),
        (("codecs", 0, "configuration", "index_codecs"), [{"name": "bytes"}], "index_codecs must be"),
        (("codecs", 0, "configuration", "chunk_shape"), [7, 32], "are not whole parts"),
        (("codecs", 0, "configuration", "index_location"), "middle", "neither start nor end"),
        (("chunk_grid", "name"), "rectangular", "not the default"),
        (("chunk_key_encoding", "name"), "v2", "not the default"),
        (("storage_transformers",), [{"name": "x"}], "not supported"),
        (("data_type",), "r16", "is not of"),
        (("node_type",), "group", "node_type array"),
    ],
)
def test_zarr3_descriptions(tmp_path: Path, path: tuple, value: object, message: str):
    save_item(tmp_path / "item", TENSORS, "files-zarr3")

    def change(content: dict) -> None:
        *parents, last = path
        for parent in parents:
            content = content[parent]
        content[last] = value

    change_json(tmp_path / "item" / "tok_embeddings" / "zarr.json", change)
    with pytest.raises(CheckpointError, match=rf"zarr\.json of tensor tok_embeddings: .*{message}"):
        open_orbax(tmp_path / "item")


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b'{"tree_metadata": {}}']
)
def test_corrupt_tree(broken: Path, text: bytes):
    (broken / "_METADATA").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"_METADATA: "):
        open_orbax(broken)


@pytest.mark.parametrize("key", ["..", ".", "", "a/b", "/etc", "../../secret", "\0", "\ud800", 3, None])
def test_names_stay_in_the_folder(broken: Path, key: object):
    def change(content: dict) -> None:
        (entry,) = [e for k, e in content["tree_metadata"].items() if "tok_embeddings" in k]
        entry["key_metadata"][0]["key"] = key

    change_json(broken / "_METADATA", change)
    with pytest.raises(CheckpointError, match=r"_METADATA: (.* is not the name of an array|its tree_metadata are)"):
        open_orbax(broken)


@pytest.mark.parametrize("name", ["manifest.ocdbt", "_METADATA", "_CHECKPOINT_METADATA"])
def test_what_is_no_file_is_not_read(tmp_path: Path, name: str):
    save_item(tmp_path / "item", TENSORS, "ocdbt")
    (tmp_path / "item" / name).unlink()
    os.mkfifo(tmp_path / "item" / name)  # reading it would never end
    with pytest.raises(CheckpointError, match=rf"{name}: is not a regular file"):
        open_orbax(tmp_path / "item")


def test_folders_without_end(files: Path):
    """Deeper than Python's stack."""
    deep = str(files / "norm")
    for _ in range(1100):
        deep += "/x"
        os.mkdir(deep)
    try:
        assert_tensors_equal(read_all(open_orbax(files)), TENSORS)
    finally:
        os.removedirs(deep)


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "d/../../secret", "./d", "%2e%2e/secret"])
def test_a_database_stays_in_its_folder(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch):
    """Places that a decoded node names, whoever decodes it."""
    save_item(tmp_path / "item", TENSORS, "ocdbt")
    (tmp_path / "secret").write_bytes(bytes(10**6))
    real = orbax_keys._Database._decode

    def decode(self, file: Path, location: str | None):
        node = real(self, file, location)
        for entry in node.get("entries", []):
            if "indirect_value" in entry:
                entry["indirect_value"] = f"value::{target}:0:100"
        return node

    monkeypatch.setattr(orbax_keys._Database, "_decode", decode)
    with pytest.raises(CheckpointError, match="which is no value in a file of"):
        open_orbax(tmp_path / "item")


def test_a_database_with_a_circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_item(tmp_path / "item", TENSORS, "ocdbt")
    real = orbax_keys._Database._decode

    def decode(self, file: Path, location: str | None):
        node = real(self, file, location)
        if location is None:
            node["versions"][-1]["root_height"] = 3
            return node
        entry = {"key": b"", "subtree_common_prefix": b"", "location": location}
        return {"height": 3, "entries": [entry]}

    monkeypatch.setattr(orbax_keys._Database, "_decode", decode)
    with pytest.raises(CheckpointError, match="its tree is malformed"):
        open_orbax(tmp_path / "item")


def test_a_database_of_many_nodes(tmp_path: Path):
    """Every key and place of a tree of several levels, with and without compression."""
    for compression in ({"id": "zstd"}, None):
        folder = tmp_path / str(compression is None)
        config = {"max_decoded_node_bytes": 300, "max_inline_value_bytes": 8, "compression": compression}
        store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/", "config": config}).result()
        expected = {f"layers.{i % 3}.wq/{i}": b"%d" % i * (i % 20 + 1) for i in range(150)}
        for key, value in expected.items():
            store[key] = value
        values = orbax_keys.ocdbt_values(folder)
        assert {key: value.at(0, 1000) for key, value in values.items()} == expected


# zstd.


def _frame(blocks: list[tuple[int, int, bytes]], header: bytes = b"\x00\x58") -> bytes:
    """A frame of (type, size field, bytes) blocks; the header of a window of 2 MiB."""
    out = b"\x28\xb5\x2f\xfd" + header
    for i, (kind, size, content) in enumerate(blocks):
        out += (size << 3 | kind << 1 | (i == len(blocks) - 1)).to_bytes(3, "little") + content
    return out


def bound(data: bytes, limit: int = 1 << 40) -> int:
    return orbax_zarr.zstd_bound(lambda start, size: data[start : start + size], len(data), limit)


def test_what_zstd_unpacks_to():
    assert bound(_frame([(0, 5, b"12345"), (1, 1 << 20, b"x")])) == 2 << 20  # the window
    assert bound(_frame([(1, (1 << 21) - 1, b"x")] * 1000)) == 1000 * ((1 << 21) - 1)
    assert bound(_frame([(2, 3, b"abc")] * 100)) == 100 * (128 << 10)
    assert bound(b"\x50\x2a\x4d\x18\x04\0\0\0skip" + _frame([(2, 3, b"abc")] * 100)) == 100 * (128 << 10)
    assert bound(_frame([(0, 5, b"12345")], b"\x20\x05")) == 5  # a single segment that says its size
    assert bound(_frame([(0, 5, b"12345")], b"\xe0" + (2**63).to_bytes(8, "little"))) == 2**63
    for data in (b"no zstd at all", _frame([(0, 5, b"123")]), _frame([(3, 5, b"12345")]), b"\x28\xb5\x2f\xfd\x00"):
        with pytest.raises((ValueError, IndexError)):
            bound(data)


def test_a_bomb_is_not_unpacked(files: Path):
    bomb = _frame([(1, (128 << 10), b"x")] * 8000)  # 1 GB in 32 kB
    (files / "tok_embeddings" / "1.0").write_bytes(bomb)
    source = open_orbax(files)
    with pytest.raises(CheckpointError, match=r"chunk 1\.0 of tensor tok_embeddings: is damaged: it unpacks to more"):
        source.read("tok_embeddings", (slice(0, 130), slice(0, 32)), np.empty((130, 32), np.float32))


# Writing.


def write_item(item: Path, tensors: Tensors, rows: int) -> None:
    with OrbaxWriter(item, infos_of(tensors)) as writer:
        for name, tensor in tensors.items():
            for start in range(0, len(tensor), rows):
                writer.write(name, tensor[start : start + rows])


def infos_of(tensors: Tensors) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


@pytest.fixture(params=[1, 7, 48, 1000])
def written(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An item in several chunks along both axes, in blocks of various heights."""
    monkeypatch.setattr(orbax_save, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(orbax_save, "STRIP_BYTES", 2048)
    write_item(tmp_path / "item", TENSORS, request.param)
    return tmp_path / "item"


def test_orbax_restores_what_was_written(written: Path):
    assert len(list((written / "layers.0.w2").glob("*.*"))) == 3 * 8 + 1  # parts of the columns, and .zarray
    assert len(list((written / "tok_embeddings").glob("*.*"))) == 9 + 1
    restored = flat(ocp.StandardCheckpointer().restore(written))
    assert {type(tensor) for tensor in restored.values()} == {np.ndarray}
    assert_tensors_equal(restored, TENSORS)
    assert_tensors_equal(read_all(open_orbax(written)), TENSORS)


def test_orbax_restores_into_shards(written: Path):
    mesh = make_mesh(2, 4)
    specs = {"layers.0.wq": P("model"), "layers.0.w2": P("data", "model"), "norm": P("model")}
    targets = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs.get(name, P())))
        for name, x in TENSORS.items()
    }
    restored = flat(ocp.StandardCheckpointer().restore(written, nested(targets)))
    assert {name: x.sharding for name, x in restored.items()} == {name: x.sharding for name, x in targets.items()}
    assert_tensors_equal(restored, TENSORS)


def test_chunks_of_published_sizes():
    bf16 = np.dtype(ml_dtypes.bfloat16)
    assert chunk_shape("tok_embeddings", TensorInfo((128256, 4096), bf16)) == (2048, 4096)
    assert chunk_shape("layers.3.w2", TensorInfo((4096, 14336), bf16)) == (1170, 1792)
    assert chunk_shape("layers.3.wo", TensorInfo((16384, 16384), bf16)) == (1024, 2048)
    assert chunk_shape("norm", TensorInfo((16384,), bf16)) == (16384,)
    assert chunk_shape("tok_embeddings", TensorInfo((10, 10**9), bf16)) == (1, 10**9)


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        ("norm", np.zeros(32, np.float16), "come next"),
        ("tok_embeddings", np.zeros((4, 32), np.float16), "come next"),
        ("tok_embeddings", np.zeros((131, 32), ml_dtypes.bfloat16), "come next"),
        ("tok_embeddings", np.zeros((32, 4), ml_dtypes.bfloat16), "whole rows are due"),
        ("other", np.zeros((4, 32), ml_dtypes.bfloat16), "come next"),
    ],
)
def test_the_writer_keeps_the_order(tmp_path: Path, name: str, block: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message), OrbaxWriter(tmp_path / "item", infos_of(TENSORS)) as writer:
        writer.write(name, block)
    with pytest.raises(CheckpointError, match="_METADATA is missing"):
        open_orbax(tmp_path / "item")


def test_the_writer_wants_every_row(tmp_path: Path):
    with pytest.raises(ValueError, match="are missing"), OrbaxWriter(tmp_path / "item", infos_of(TENSORS)) as writer:
        writer.write("tok_embeddings", TENSORS["tok_embeddings"][:100])
    with pytest.raises(CheckpointError, match="_METADATA is missing"):
        open_orbax(tmp_path / "item")
    with pytest.raises(ValueError, match="int32 is not one of"):
        OrbaxWriter(tmp_path / "ints", {"norm": TensorInfo((3,), np.dtype(np.int32))})


def test_a_failing_write_is_told(tmp_path: Path):
    writer = OrbaxWriter(tmp_path / "item", {"norm": TensorInfo((3,), np.dtype(np.float32))})
    (tmp_path / "item" / "norm").write_bytes(b"a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"norm: cannot be written"):
        writer.write("norm", np.zeros(3, np.float32))


def test_without_orbax(item: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorstore", None)
    for use in (lambda: open_orbax(item), lambda: OrbaxWriter(tmp_path / "item", {})):
        with pytest.raises(CheckpointError, match=r"pip install 'sharded_llama\[orbax\]'"):
            use()
