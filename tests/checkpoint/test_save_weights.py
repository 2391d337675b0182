"""Export: bit for bit what was loaded, as transformers loads it; complete or not there at all."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from hf_models import CONFIG, State, assert_bits_equal, save_random_model, state_of
from safetensors import safe_open
from safetensors.torch import load_file

from sharded_llama.checkpoint import load_weights, open_checkpoint, save_weights
from sharded_llama.checkpoint.export import ExportFormat
from sharded_llama.checkpoint.hf import writer
from sharded_llama.checkpoint.hf.writer import to_hf_dict
from sharded_llama.config import LlamaConfig
from sharded_llama.errors import CheckpointError
from sharded_llama.mesh import make_mesh
from sharded_llama.weights import XfmrWeights, init_weights

MODELS = {
    "float32": CONFIG,
    "bfloat16-tied": CONFIG.replace(dtype="bfloat16", tie_embeddings=True, rope_scaling=None, eos_ids=(2,)),
    "float16-one-kv-head": CONFIG.replace(dtype="float16", n_kv_heads=1, bos_id=None, eos_ids=()),
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    config = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return folder, config, save_random_model(folder, config)


@pytest.fixture(scope="module")
def weights() -> XfmrWeights:
    return init_weights(jax.random.key(0), CONFIG, mesh=make_mesh(2, 4))


def assert_same_state(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bits_equal(actual[name], tensor)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 8)], ids=str)
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 60_000], ids=["one-file", "shards"])
def test_round_trip(saved, tmp_path: Path, shape: tuple[int, int], max_shard_bytes: int):
    original, config, state = saved
    folder = tmp_path / "new" / "model"
    loaded = load_weights(open_checkpoint(original), config, mesh=make_mesh(*shape))
    save_weights(loaded, config, folder, format=ExportFormat("hf", max_shard_bytes))

    files = sorted(folder.glob("*.safetensors"))
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) == 1 or all(file.stat().st_size < max_shard_bytes + 10_000 for file in files)
    assert (len(files) == 1) == (max_shard_bytes > 10**6)
    assert stored.keys() == load_file(original / "model.safetensors").keys()

    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == getattr(torch, config.dtype)
    assert_same_state(state_of(model), state)
    assert LlamaConfig.from_hf(folder) == config


def test_an_index_has_what_the_files_have(saved, tmp_path: Path):
    original, config, state = saved
    loaded = load_weights(open_checkpoint(original), config, mesh=make_mesh())
    save_weights(loaded, config, tmp_path / "model", format=ExportFormat("hf", 60_000))
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    found = {}
    for file in (tmp_path / "model").glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            assert f.metadata() == {"format": "pt"}
            found |= {name: file.name for name in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
    assert index["weight_map"] == found
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    assert index["metadata"]["total_size"] == sum(x.nbytes for name, x in state.items() if name not in tied)


def test_float64(tmp_path: Path):
    with jax.enable_x64(True):
        config = CONFIG.replace(dtype="float64")
        state = save_random_model(tmp_path / "a", config)
        loaded = load_weights(open_checkpoint(tmp_path / "a"), config, mesh=make_mesh(1, 8))
        save_weights(loaded, config, tmp_path / "b")
    assert_same_state({k: v.numpy() for k, v in load_file(tmp_path / "b" / "model.safetensors").items()}, state)


def test_config_is_what_transformers_understands():
    config = transformers.LlamaConfig(**to_hf_dict(CONFIG))
    assert config.rope_parameters == {
        "rope_theta": 500000.0,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (64, 12, 2)
    assert (config.bos_token_id, config.eos_token_id, config.max_position_embeddings) == (1, [2, 5], 512)
    assert config.rms_norm_eps == 1e-5
    assert config.dtype == torch.float32
    none = transformers.LlamaConfig(**to_hf_dict(MODELS["float16-one-kv-head"]))
    assert (none.bos_token_id, none.eos_token_id) == (None, None)


def test_the_logits_survive(saved, tmp_path: Path):
    """Rotary scaling, eps and head sizes of the exported config give the same model."""
    original, config, _ = saved
    loaded = load_weights(open_checkpoint(original), config, mesh=make_mesh(1, 4))
    save_weights(loaded, config, tmp_path / "model")
    exported = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    reference = transformers.LlamaForCausalLM.from_pretrained(
        original, dtype=torch.float32, config=transformers.LlamaConfig(**to_hf_dict(config))
    )
    tokens = torch.arange(20)[None]
    assert torch.equal(exported(tokens).logits, reference(tokens).logits)


def test_the_tokenizer_comes_along(weights: XfmrWeights, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "other.bin"):
        (source / name).write_text(name)
    save_weights(weights, CONFIG, tmp_path / "model", tokenizer_folder=source)
    files = {path.name for path in (tmp_path / "model").iterdir()}
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert files == {"model.safetensors", "config.json"} | copied
    assert all((tmp_path / "model" / name).read_text() == name for name in copied)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "llama"


def test_a_folder_without_tokenizer(weights: XfmrWeights, tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        save_weights(weights, CONFIG, tmp_path / "model", tokenizer_folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_end_of_sequence_ids_are_those_of_the_config(weights: XfmrWeights, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for stated, kept in (([2, 5], [2, 5]), (7, [2, 5]), (None, None)):
        settings = {"do_sample": True, "temperature": 0.5, "eos_token_id": stated}
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        save_weights(weights, CONFIG, tmp_path / f"model{stated}", tokenizer_folder=tmp_path)
        assert LlamaConfig.from_hf(tmp_path / f"model{stated}") == CONFIG
        written = json.loads((tmp_path / f"model{stated}" / "generation_config.json").read_text())
        assert written == settings | {"eos_token_id": kept}


def test_through_a_symbolic_link(weights: XfmrWeights, tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "empty").symlink_to("disk")
    (tmp_path / "dangling").symlink_to("disk/later")
    save_weights(weights, CONFIG, tmp_path / "empty")
    assert (tmp_path / "disk" / "config.json").exists()
    assert (tmp_path / "empty").is_symlink()
    shutil.rmtree(tmp_path / "disk")
    save_weights(weights, CONFIG, tmp_path / "dangling")
    assert open_checkpoint(tmp_path / "disk" / "later").tensors


def test_names_that_cannot_be(weights: XfmrWeights, tmp_path: Path):
    for name in ("x" * 300, "/proc/self/mem/x", "/"):
        with pytest.raises(CheckpointError, match=r"cannot be written|is where a disk is mounted|already exists"):
            save_weights(weights, CONFIG, tmp_path / name)


def test_nothing_is_overwritten(weights: XfmrWeights, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    save_weights(weights, CONFIG, tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for name in ("full", "empty", "full/notes.txt"):
        with pytest.raises(CheckpointError, match=f"{name} already exists"):
            save_weights(weights, CONFIG, tmp_path / name)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_failed_export_leaves_nothing(weights: XfmrWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = writer.SafetensorsWriter
    written = []

    def fail_on_the_third(file: Path, *args) -> writer.SafetensorsWriter:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(file)
        return real(file, *args)

    monkeypatch.setattr(writer, "SafetensorsWriter", fail_on_the_third)
    with pytest.raises(CheckpointError, match=r"model: cannot be written: .*No space left"):
        save_weights(weights, CONFIG, tmp_path / "model", format=ExportFormat("hf", 60_000))
    assert len(written) == 2
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
import jax
from sharded_llama.checkpoint import export
from sharded_llama.mesh import make_mesh, simulate_cpu_devices
from sharded_llama.config import LlamaConfig
from sharded_llama.weights import init_weights
simulate_cpu_devices(1)
config = LlamaConfig(dim=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=8, vocab_size=16,
                     norm_eps=1e-5, rope_theta=1e4, dtype="float32")
export.write_json = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # the weights are written, config.json is not
export.save_weights(init_weights(jax.random.key(0), config, mesh=make_mesh()), config, sys.argv[1])
"""


def test_a_killed_export_leaves_nothing_that_loads(weights: XfmrWeights, tmp_path: Path):
    folder = tmp_path / "model"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(CheckpointError, match="No such file"):
        open_checkpoint(folder)
    (partial,) = tmp_path.iterdir()
    assert "partial" in partial.name
    with pytest.raises((OSError, ValueError), match=r"config\.json|model_type"):
        transformers.AutoModelForCausalLM.from_pretrained(partial)
    save_weights(weights, CONFIG, folder)
    assert open_checkpoint(folder).tensors


def test_weights_keep_no_copy_on_the_host(weights: XfmrWeights, tmp_path: Path):
    """JAX caches what NumPy reads of an array: an export must not leave the whole model on the host."""
    save_weights(weights, CONFIG, tmp_path / "model")
    assert all(array._npy_value is None for array in jax.tree.leaves(weights))
    read = weights.tok_embeddings + 0
    np.asarray(read)
    assert read._npy_value is not None  # the attribute means what this test takes it for
