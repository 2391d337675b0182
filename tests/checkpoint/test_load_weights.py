"""Loading: every array equals NumPy's own fusing, on every mesh; a wrong checkpoint is refused by name."""

import threading
from collections import Counter, defaultdict
from pathlib import Path

import jax
import numpy as np
import pytest
from hf_models import CONFIG, State, assert_bits_equal, expected_weights, save_random_model
from safetensors.numpy import load_file, save_file

from sharded_llama.checkpoint import load_weights, open_checkpoint, reader, reads
from sharded_llama.checkpoint.reader import read_weights
from sharded_llama.checkpoint.source import CheckpointSource
from sharded_llama.config import LlamaConfig
from sharded_llama.errors import CheckpointError, MeshError
from sharded_llama.mesh import make_mesh
from sharded_llama.weights import XfmrWeights, abstract_weights

MESHES = [(1, 1), (2, 4), (1, 8), (4, 2)]
CHECKPOINTS = {
    "float32": (CONFIG, "5GB"),
    "float16-sharded": (CONFIG.replace(dtype="float16"), "40KB"),
    "bfloat16-sharded": (CONFIG.replace(dtype="bfloat16"), "40KB"),
    "float32-tied": (CONFIG.replace(tie_embeddings=True), "5GB"),
    "one-kv-head": (CONFIG.replace(n_kv_heads=1), "5GB"),
    "eight-kv-heads": (CONFIG.replace(n_kv_heads=8, vocab_size=6), "5GB"),
}


class CountingSource:
    """A source that counts the bytes read of each tensor, and the threads that read."""

    def __init__(self, source: CheckpointSource):
        self.source, self.location, self.tensors = source, source.location, source.tensors
        self.bytes: Counter[str] = Counter()
        self.slices: defaultdict[str, list[tuple[slice, ...]]] = defaultdict(list)
        self.order: list[str] = []
        self.format = source.format
        self.lock = threading.Lock()

    def stored_name(self, name: str) -> str:
        return self.source.stored_name(name)

    def read(self, name: str, slices: tuple[slice, ...], out: np.ndarray) -> int:
        count = self.source.read(name, slices, out)
        with self.lock:
            self.bytes[name] += count
            self.slices[name].append(slices)
            self.order.append(name)
        return count


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    config, max_shard_size = CHECKPOINTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return folder, config, save_random_model(folder, config, max_shard_size=max_shard_size)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, save_random_model(folder, CONFIG)


def assert_weights_equal(actual: XfmrWeights, expected: XfmrWeights) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(assert_bits_equal, actual, expected)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_weights_equal_numpy(checkpoint: tuple[Path, LlamaConfig, State], shape: tuple[int, int]):
    folder, config, state = checkpoint
    mesh = make_mesh(*shape)
    weights = load_weights(open_checkpoint(folder), config, mesh=mesh)
    assert_weights_equal(weights, expected_weights(state, config, mesh.shape["model"]))
    described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), (weights, abstract_weights(config, mesh)))
    assert described[0] == described[1]


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_converted(checkpoint: tuple[Path, LlamaConfig, State], dtype: str, shape: tuple[int, int]):
    folder, config, state = checkpoint
    config = config.replace(dtype=dtype)
    weights = load_weights(open_checkpoint(folder), config, mesh=make_mesh(*shape))
    assert_weights_equal(weights, expected_weights(state, config, shape[1]))


def test_small_blocks_and_one_thread(plain: tuple[Path, State], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reads, "BLOCK_BYTES", 100)
    folder, state = plain
    weights = load_weights(open_checkpoint(folder), CONFIG, mesh=make_mesh(1, 8), threads=1, max_bytes_in_flight=0)
    assert_weights_equal(weights, expected_weights(state, CONFIG, 8))


@pytest.mark.parametrize("unit_bytes", [None, 5_000, 1])
@pytest.mark.parametrize("shape", [*MESHES, (1, 2)], ids=str)
def test_every_byte_is_read_once(
    plain: tuple[Path, State], shape: tuple[int, int], unit_bytes: int | None, monkeypatch: pytest.MonkeyPatch
):
    """Replicas over `data`, repeated kv heads and columns share their reads, and the statistics count what was read."""
    monkeypatch.setattr(reader, "_unit_bytes", lambda mesh: unit_bytes)
    folder, state = plain
    source = CountingSource(open_checkpoint(folder))
    weights, stats = read_weights(source, CONFIG, mesh=make_mesh(*shape))
    assert_weights_equal(weights, expected_weights(state, CONFIG, shape[1]))
    for name, info in source.tensors.items():
        touched = np.zeros(info.shape, int)
        for slices in source.slices[name]:
            touched[slices] += 1
        assert (touched == 1).all(), name
        assert source.bytes[name] == info.nbytes, name
    assert stats.nbytes == sum(info.nbytes for info in source.tensors.values())


def test_large_arrays_are_uploaded_in_parts(plain: tuple[Path, State], monkeypatch: pytest.MonkeyPatch):
    """As on devices with their own memory: no more than a unit is on its way to all devices at once, over replicas."""
    uploads, real = [], jax.make_array_from_callback

    def make_array(shape, sharding, callback, **kwargs):
        shards = {str(index): index for index in sharding.addressable_devices_indices_map(shape).values()}
        uploads.append(sum(callback(index).nbytes for index in shards.values()))
        return real(shape, sharding, callback, **kwargs)

    monkeypatch.setattr(reader, "_unit_bytes", lambda mesh: 8_000)
    monkeypatch.setattr(jax, "make_array_from_callback", make_array)
    folder, state = plain
    mesh = make_mesh(2, 2)
    weights = load_weights(open_checkpoint(folder), CONFIG, mesh=mesh)
    assert_weights_equal(weights, expected_weights(state, CONFIG, 2))
    described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), (weights, abstract_weights(CONFIG, mesh)))
    assert described[0] == described[1]
    assert max(uploads) <= 8_000
    assert sum(uploads) == sum(x.nbytes for x in jax.tree.leaves(weights))


def test_the_bound_on_bytes_in_flight_holds_back_reads(plain: tuple[Path, State], monkeypatch: pytest.MonkeyPatch):
    """With a bound of nothing, no array is read before the one before it is on its devices."""
    folder, _ = plain
    source = CountingSource(open_checkpoint(folder))
    real = jax.make_array_from_callback

    def make_array(shape, *args, **kwargs):
        source.order.append("made")
        return real(shape, *args, **kwargs)

    monkeypatch.setattr(jax, "make_array_from_callback", make_array)
    load_weights(source, CONFIG, mesh=make_mesh(1, 8), max_bytes_in_flight=0)
    groups = [set(group.split()) for group in " ".join(source.order).split("made")]
    layer = [["attention_norm"], ["wq", "wk", "wv"], ["wo"], ["ffn_norm"], ["w1", "w3"], ["w2"]]
    layers = [{f"layers.{i}.{name}" for name in names} for i in range(2) for names in layer]
    assert groups == [{"tok_embeddings"}, *layers, {"norm"}, {"output"}, set()]


def test_donating_a_replica_leaves_the_others(plain: tuple[Path, State]):
    """On CPU the replicas of a shard share one buffer: an update in place must not be seen through another."""
    folder, state = plain
    mesh = make_mesh(4, 2)
    weights = load_weights(open_checkpoint(folder), CONFIG, mesh=mesh)
    update = jax.jit(lambda w: jax.tree.map(lambda x: 2 * x, w), donate_argnums=0)
    doubled = update(weights)
    expected = expected_weights(state, CONFIG, 2)
    for array, reference in zip(jax.tree.leaves(doubled), jax.tree.leaves(expected), strict=True):
        for shard in array.addressable_shards:
            assert_bits_equal(shard.data, 2 * reference[shard.index])


def test_a_mesh_of_some_devices(plain: tuple[Path, State]):
    folder, state = plain
    mesh = make_mesh(1, 2, devices=jax.devices()[5:7])
    weights = load_weights(open_checkpoint(folder), CONFIG, mesh=mesh)
    assert_weights_equal(weights, expected_weights(state, CONFIG, 2))
    assert {d.id for d in weights.norm.devices()} == {5, 6}


def test_a_mesh_that_does_not_fit(plain: tuple[Path, State]):
    with pytest.raises(MeshError, match="Sizes that work: 1, 2, 4, 8"):
        load_weights(open_checkpoint(plain[0]), CONFIG, mesh=make_mesh(1, 3))


def test_an_output_beside_tied_embeddings_is_not_used(plain: tuple[Path, State]):
    folder, state = plain
    config = CONFIG.replace(tie_embeddings=True)
    weights = load_weights(open_checkpoint(folder), config, mesh=make_mesh(2, 4))
    assert weights.output is None
    assert_weights_equal(weights, expected_weights(state, config, 4))


def edited(folder: Path, target: Path, **changes: np.ndarray | None) -> CheckpointSource:
    """A checkpoint with some tensors changed, or left out (None)."""
    tensors = load_file(folder / "model.safetensors") | {name.replace("__", "."): x for name, x in changes.items()}
    save_file({name: x for name, x in tensors.items() if x is not None}, target / "model.safetensors")
    return open_checkpoint(target)


Q_PROJ = "model__layers__1__self_attn__q_proj__weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q_PROJ: None}, r"missing tensors: model\.layers\.1\.self_attn\.q_proj\.weight \(96, 64\)\.$"),
        ({"lm_head__weight": None}, r"missing tensors: lm_head\.weight \(131, 64\)\.$"),
        (
            {Q_PROJ: np.zeros((64, 96), np.float32)},
            r"misshapen tensors: model\.layers\.1\.self_attn\.q_proj\.weight is \(64, 96\), should be \(96, 64\)\.$",
        ),
        (
            {"model__layers__0__self_attn__q_proj__bias": np.zeros(96, np.float32)},
            r"extra tensors: model\.layers\.0\.self_attn\.q_proj\.bias \(96,\)\.$",
        ),
        (
            {"model__norm__weight": None, "norm__weight": np.zeros(64, np.float32)},
            r"missing tensors: model\.norm\.weight \(64,\); extra tensors: norm\.weight \(64,\)\.$",
        ),
    ],
    ids=["missing", "no-output", "misshapen", "extra", "renamed"],
)
def test_a_checkpoint_of_another_model(plain, tmp_path: Path, changes: dict, message: str):
    source = CountingSource(edited(plain[0], tmp_path, **changes))
    with pytest.raises(CheckpointError, match=message):
        load_weights(source, CONFIG, mesh=make_mesh(1, 8))
    assert not source.order


def test_many_wrong_tensors_are_counted(plain: tuple[Path, State]):
    with pytest.raises(CheckpointError, match=r"missing tensors: (\S+ \(.*?\), ){4}\S+ \(.*?\) and 4 more\.$"):
        load_weights(open_checkpoint(plain[0]), CONFIG.replace(n_layers=3), mesh=make_mesh())
    with pytest.raises(CheckpointError, match=r"extra tensors: .* and 4 more\.$"):
        load_weights(open_checkpoint(plain[0]), CONFIG.replace(n_layers=1), mesh=make_mesh())


def test_a_failed_read_is_raised(plain: tuple[Path, State], tmp_path: Path):
    source = edited(plain[0], tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200_000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot read tensor"):
        load_weights(source, CONFIG, mesh=make_mesh(2, 4))


def test_no_progress_bar_without_a_terminal(plain: tuple[Path, State], capfd: pytest.CaptureFixture[str]):
    load_weights(open_checkpoint(plain[0]), CONFIG, mesh=make_mesh())
    assert "Loading" not in capfd.readouterr().err


def test_the_progress_bar_counts_bytes(plain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    source = open_checkpoint(plain[0])
    load_weights(source, CONFIG, mesh=make_mesh())
    total = sum(info.nbytes for info in source.tensors.values())
    last = capsys.readouterr().err.split("\r")[-1]
    assert "100%" in last
    assert f"{total / 1e3:.0f}k/{total / 1e3:.0f}k " in last
    load_weights(source, CONFIG, mesh=make_mesh(), progress=False)
    assert capsys.readouterr().err == ""
