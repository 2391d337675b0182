"""Weights on any mesh, saved and loaded on any other: the same bits, whatever happens to the weights meanwhile."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hf_models import CONFIG, State, assert_bits_equal, expected_weights
from jax.sharding import Mesh
from orbax_items import flat

from sharded_llama.checkpoint import load_weights, open_checkpoint
from sharded_llama.checkpoint.layout import canonical_shapes
from sharded_llama.checkpoint.names import HF_NAMES, to_stored
from sharded_llama.checkpoint.orbax import live as orbax_live
from sharded_llama.checkpoint.orbax.live import save_orbax
from sharded_llama.checkpoint.orbax.unfuse import unfuse_weights
from sharded_llama.config import LlamaConfig
from sharded_llama.errors import CheckpointError, MeshError
from sharded_llama.mesh import make_mesh
from sharded_llama.weights import XfmrWeights, abstract_weights

MESHES = [(1, 1), (2, 4), (1, 8)]
EVEN = CONFIG.replace(vocab_size=128, ffn_dim=96, head_dim=16)  # every axis divides by 8, and a head by its copies
MODELS = {
    "odd": CONFIG.replace(dtype="bfloat16"),  # of 8 shards, 4 share a kv head of 12 rows: 3 each
    "even-tied": EVEN.replace(tie_embeddings=True),
    "indivisible": CONFIG.replace(dtype="float16", dim=62, head_dim=6),  # nor does D; 6 rows on 4 copies
    "one-kv-head": EVEN.replace(n_kv_heads=1, dtype="bfloat16"),
    "eight-kv-heads": CONFIG.replace(n_kv_heads=8, vocab_size=6, eos_ids=(2,)),
}


# model, mesh to save on, meshes to load on
ROUND_TRIPS = [
    ("odd", (1, 1), [(2, 4), (1, 8)]),
    ("odd", (2, 4), [(1, 8)]),
    ("odd", (1, 8), [(1, 1), (4, 2)]),
    ("even-tied", (2, 4), [(1, 8)]),
    ("indivisible", (1, 8), [(2, 4)]),
    ("one-kv-head", (1, 8), [(1, 1)]),
    ("eight-kv-heads", (2, 4), [(1, 8)]),
]


def random_state(config: LlamaConfig) -> State:
    rng = np.random.default_rng(0)
    shapes = canonical_shapes(config)
    return {to_stored(n, HF_NAMES): rng.standard_normal(s).astype(config.jnp_dtype) for n, s in shapes.items()}


def weights_of(state: State, config: LlamaConfig, mesh: Mesh) -> XfmrWeights:
    targets = abstract_weights(config, mesh)
    expected = expected_weights(state, config, mesh.shape["model"])
    return jax.tree.map(lambda x, target: jax.device_put(x, target.sharding), expected, targets)


@pytest.fixture(scope="module")
def weights() -> XfmrWeights:
    return weights_of(random_state(CONFIG), CONFIG, make_mesh(2, 4))


def assert_weights_equal(actual: XfmrWeights, expected: XfmrWeights) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(assert_bits_equal, actual, expected)


@pytest.mark.parametrize(("model", "shape", "others"), ROUND_TRIPS, ids=str)
def test_saved_on_one_mesh_and_loaded_on_others(
    tmp_path: Path, model: str, shape: tuple[int, int], others: list[tuple[int, int]]
):
    config = MODELS[model]
    state, mesh = random_state(config), make_mesh(*shape)
    save_orbax(weights_of(state, config, mesh), config, tmp_path / "new" / "model", mesh=mesh).wait()
    source = open_checkpoint(tmp_path / "new" / "model")
    assert (source.format, source.read_config()) == ("orbax", config)
    for other in others:
        loaded = load_weights(source, config, mesh=make_mesh(*other))
        assert_weights_equal(loaded, expected_weights(state, config, other[1]))
    dtype = config.replace(dtype="float32" if config.dtype != "float32" else "bfloat16")
    assert_weights_equal(load_weights(source, dtype, mesh=mesh), expected_weights(state, dtype, shape[1]))

    restored = flat(ocp.StandardCheckpointer().restore(tmp_path / "new" / "model" / "weights"))
    assert restored.keys() == canonical_shapes(config).keys()
    for name, tensor in restored.items():
        assert type(tensor) is np.ndarray
        assert_bits_equal(tensor, state[to_stored(name, HF_NAMES)])


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_canonical_tensors_are_split(shape: tuple[int, int]):
    """Every matrix, over the whole `model` axis, where the sizes allow it."""
    mesh = make_mesh(*shape)
    tensors = flat(unfuse_weights(weights_of(random_state(CONFIG), CONFIG, mesh), CONFIG, mesh))
    for name, tensor in tensors.items():
        parts = 1 if tensor.ndim == 1 else shape[1]
        assert tensor.addressable_shards[0].data.nbytes == tensor.nbytes // parts, name


def collectives(config: LlamaConfig, shape: tuple[int, int]) -> set[str]:
    mesh = make_mesh(*shape)
    program = jax.jit(lambda weights: unfuse_weights(weights, config, mesh)).lower(abstract_weights(config, mesh))
    names = "all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"
    return set(re.findall(rf"\b({names})(?:-start)?\(", program.compile().as_text()))


@pytest.mark.parametrize("shape", [(2, 4), (1, 8)], ids=str)
def test_no_weight_is_gathered(shape: tuple[int, int]):
    """Sizes that divide move nothing; of padded ones the devices exchange parts."""
    assert collectives(EVEN, shape) == set()
    assert collectives(CONFIG, shape) == {"all-to-all"}


def test_donated_weights_do_not_change_what_is_saved(tmp_path: Path):
    mesh = make_mesh(2, 4)
    weights = weights_of(random_state(EVEN), EVEN, mesh)
    expected = jax.tree.map(np.array, weights)
    saving = save_orbax(weights, EVEN, tmp_path / "model", mesh=mesh)
    update = jax.jit(lambda w: jax.tree.map(lambda x: 2 * x, w), donate_argnums=0)
    doubled = jax.block_until_ready(update(weights))
    assert weights.norm.is_deleted()
    assert not (tmp_path / "model").exists()
    saving.wait()
    saving.wait()
    assert_weights_equal(load_weights(open_checkpoint(tmp_path / "model"), EVEN, mesh=mesh), expected)
    assert_bits_equal(doubled.norm, 2 * expected.norm)


def test_chunks_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: XfmrWeights):
    monkeypatch.setattr(orbax_live, "CHUNK_BYTES", 1024)
    save_orbax(weights, CONFIG, tmp_path / "model", mesh=make_mesh(2, 4)).wait()
    source = open_checkpoint(tmp_path / "model")
    assert max(tensor.array.chunk_bytes for tensor in source.tensors.values()) <= 1024
    assert_weights_equal(load_weights(source, CONFIG, mesh=make_mesh(2, 4)), jax.tree.map(np.array, weights))


def test_the_tokenizer_comes_along(weights: XfmrWeights, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "other.bin"):
        (source / name).write_text(name)
    (source / "generation_config.json").write_text('{"do_sample": true, "eos_token_id": [2, 5]}')
    save_orbax(weights, CONFIG, tmp_path / "model", mesh=make_mesh(2, 4), tokenizer_folder=source).wait()
    files = {path.name: path for path in (tmp_path / "model").iterdir()}
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert files.keys() == {"weights", "config.json"} | copied
    assert all(files[name].read_bytes() == (source / name).read_bytes() for name in copied)
    assert json.loads(files["config.json"].read_text())["model_type"] == "llama"
    assert open_checkpoint(tmp_path / "model").read_config() == CONFIG


def test_what_cannot_be_saved(weights: XfmrWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mesh = make_mesh(2, 4)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        save_orbax(weights, CONFIG, tmp_path / "model", mesh=mesh, tokenizer_folder=tmp_path)
    with pytest.raises(MeshError, match="model=3"):
        save_orbax(weights, CONFIG, tmp_path / "model", mesh=make_mesh(2, 3))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "orbax.checkpoint", None)
        with pytest.raises(CheckpointError, match=r"pip install 'sharded_llama\[orbax\]'"):
            save_orbax(weights, CONFIG, tmp_path / "model", mesh=mesh)
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="full already exists"):
        save_orbax(weights, CONFIG, tmp_path / "full", mesh=mesh)
    (tmp_path / "empty").mkdir()
    save_orbax(weights, CONFIG, tmp_path / "empty", mesh=mesh).wait()
    assert sorted(os.listdir(tmp_path)) == ["empty", "full"]
    assert open_checkpoint(tmp_path / "empty").read_config() == CONFIG


def test_a_failure_in_the_background(weights: XfmrWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is raised by every `wait`, and leaves nothing."""

    async def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", fail)
    saving = save_orbax(weights, CONFIG, tmp_path / "model", mesh=make_mesh(2, 4))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"model: cannot be written: .*No space left"):
            saving.wait()
    assert not list(tmp_path.iterdir())


def test_a_failure_at_the_end(weights: XfmrWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saving = save_orbax(weights, CONFIG, tmp_path / "model", mesh=make_mesh(2, 4))
    monkeypatch.setattr(orbax_live, "write_json", lambda *args: (_ for _ in ()).throw(OSError(5, "disk on fire")))
    with pytest.raises(CheckpointError, match=r"model: cannot be written: .*disk on fire"):
        saving.wait()
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
import jax
from sharded_llama.checkpoint.orbax import live as orbax_live
from sharded_llama.mesh import make_mesh, simulate_cpu_devices
from sharded_llama.config import LlamaConfig
from sharded_llama.weights import init_weights
simulate_cpu_devices(1)
config = LlamaConfig(dim=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=8, vocab_size=16,
                     norm_eps=1e-5, rope_theta=1e4, dtype="float32")
weights = init_weights(jax.random.key(0), config, mesh=make_mesh())
saving = orbax_live.save_orbax(weights, config, sys.argv[1], mesh=make_mesh())
orbax_live.to_hf_dict = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # after the weights
saving.wait()
"""


def test_a_killed_save_leaves_nothing_that_opens(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "model")], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    (partial,) = tmp_path.iterdir()
    assert (partial / "weights" / "_METADATA").exists()
    for folder in (partial, partial / "weights"):
        with pytest.raises(CheckpointError, match="temporary folder of a save that was not finished"):
            open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="No such file"):
        open_checkpoint(tmp_path / "model")


def test_inside_an_event_loop(weights: XfmrWeights, tmp_path: Path):
    """As in a notebook."""
    import asyncio

    async def save() -> None:
        save_orbax(weights, CONFIG, tmp_path / "model", mesh=make_mesh(2, 4)).wait()

    asyncio.run(save())
    assert open_checkpoint(tmp_path / "model").tensors.keys() == canonical_shapes(CONFIG).keys()
