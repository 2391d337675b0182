"""Conversion: from any format to any other and back to the same bits; whole, or not there at all."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers
from hf_models import State, assert_bits_equal, expected_weights, save_random_model, to_numpy
from meta_models import CONFIG as BASE, split, to_meta_names
from safetensors.torch import load_file

from sharded_llama.checkpoint import (
    CheckpointSource,
    ExportFormat,
    TensorInfo,
    convert,
    export,
    load_weights,
    open_checkpoint,
    save_weights,
)
from sharded_llama.checkpoint.describe import describe, describe_mesh
from sharded_llama.checkpoint.hf.writer import to_hf_dict
from sharded_llama.checkpoint.verify import verify
from sharded_llama.config import LlamaConfig, RopeScaling
from sharded_llama.errors import CheckpointError, ConfigError, MeshError
from sharded_llama.json_file import write_json
from sharded_llama.mesh import make_mesh

SCALING = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64)
CONFIG = BASE.replace(dtype="bfloat16", rope_scaling=SCALING, max_seq_len=777, eos_ids=(2, 7))
MESHES = [(1, 1), (1, 2), (2, 4), (1, 8)]


def save_hf_model(folder: Path, config: LlamaConfig) -> State:
    state = save_random_model(folder, config)
    write_json(folder / "config.json", to_hf_dict(config))
    write_json(folder / "generation_config.json", {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 7]})
    return state


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    folder = tmp_path_factory.mktemp("model")
    return folder, save_hf_model(folder, CONFIG)


def to(source: Path, folder: Path, format: str = "hf", config: LlamaConfig = CONFIG, **settings) -> CheckpointSource:
    convert(open_checkpoint(source), config, folder, ExportFormat(format, **settings))
    return open_checkpoint(folder)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("files", [1, 2, 4, 8])
def test_a_round_through_all_formats(tmp_path: Path, files: int, tied: bool):
    """Hugging Face to orbax to Meta to Hugging Face, each loaded on meshes of 1 to 8 devices on the way."""
    config = CONFIG.replace(tie_embeddings=tied)
    state = save_hf_model(tmp_path / "hf", config)
    opened = [
        to(tmp_path / "hf", tmp_path / "orbax", "orbax", config),
        to(tmp_path / "orbax", tmp_path / "meta", "meta", config, meta_files=files),
        to(tmp_path / "meta", tmp_path / "again", "hf", config, max_shard_bytes=20_000),
    ]
    assert [source.format for source in opened] == ["orbax", "Meta", "Hugging Face safetensors"]
    assert len(list((tmp_path / "meta").glob("*.pth"))) == files
    for source in opened:
        assert source.read_config() == config
        assert verify(open_checkpoint(tmp_path / "hf"), source, config) == 20 + (not tied)
    for source, shape in zip([*opened, opened[0]], MESHES, strict=True):
        weights = load_weights(source, config, mesh=make_mesh(*shape))
        jax.tree.map(assert_bits_equal, weights, expected_weights(state, config, shape[1]))
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    again = {k: x for file in (tmp_path / "again").glob("*.safetensors") for k, x in load_file(file).items()}
    assert again.keys() == stored.keys()
    for name, tensor in stored.items():
        assert_bits_equal(to_numpy(again[name]), to_numpy(tensor))
    assert (tmp_path / "again" / "generation_config.json").read_text() == (
        tmp_path / "hf" / "generation_config.json"
    ).read_text()


@pytest.mark.parametrize("files", [1, 2, 8])
def test_meta_files_are_what_torch_reads(model: tuple[Path, State], tmp_path: Path, files: int):
    """The parts of every rank, worked out by torch, and as Meta's code loads them."""
    folder, state = model
    to(folder, tmp_path / "meta", "meta", meta_files=files)
    tensors = {name: torch.from_numpy(x.astype("float32")).bfloat16() for name, x in state.items()}
    for rank, expected in enumerate(split(to_meta_names(tensors, CONFIG), files, "width")):
        found = torch.load(tmp_path / "meta" / f"consolidated.{rank:02}.pth", weights_only=True, mmap=True)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == torch.bfloat16
            assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


def test_transformers_loads_what_came_from_meta(model: tuple[Path, State], tmp_path: Path):
    folder, _ = model
    to(folder, tmp_path / "meta", "meta", meta_files=4)
    to(tmp_path / "meta", tmp_path / "hf", "hf")
    tokens = torch.arange(40)[None]
    logits = [
        transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
        for path in (folder, tmp_path / "hf")
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("format", ["hf", "meta", "orbax"])
def test_dtype(model: tuple[Path, State], tmp_path: Path, format: str):
    folder, state = model
    config = CONFIG.replace(dtype="float16")
    source = to(folder, tmp_path / "new", format, config)
    assert {info.dtype.name for info in source.tensors.values()} == {"float16"}
    assert verify(open_checkpoint(folder), source, config) == 21
    weights = load_weights(source, config, mesh=make_mesh(2, 4))
    jax.tree.map(assert_bits_equal, weights, expected_weights(state, config, 4))


def test_the_dtype_that_holds_all_tensors(tmp_path: Path):
    def stored(*dtypes: str) -> str:
        tensors = {str(i): TensorInfo((1,), jnp.dtype(dtype)) for i, dtype in enumerate(dtypes)}
        return export.stored_dtype(SimpleNamespace(tensors=tensors))

    assert [stored(d) for d in ("bfloat16", "float16", "float32")] == ["bfloat16", "float16", "float32"]
    assert stored("bfloat16", "float16") == stored("bfloat16", "float32", "bfloat16") == "float32"
    assert stored("float32", "float64") == "float64"


@pytest.mark.parametrize("format", ["hf", "meta", "orbax"])
def test_weights_on_a_mesh(model: tuple[Path, State], tmp_path: Path, format: str):
    folder, _ = model
    weights = load_weights(open_checkpoint(folder), CONFIG, mesh=make_mesh(2, 4))
    save_weights(weights, CONFIG, tmp_path / "new", ExportFormat(format, meta_files=2))
    assert verify(open_checkpoint(folder), open_checkpoint(tmp_path / "new"), CONFIG) == 21


def test_large_tensors_pass_in_blocks(model: tuple[Path, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No block is larger than the bound, but for the heads that Meta's layout permutes."""
    monkeypatch.setattr(export, "BLOCK_BYTES", 2048)
    folder, _ = model
    sizes = [block.nbytes for _, block in export.source_blocks(open_checkpoint(folder), CONFIG)]
    assert max(sizes) <= 2048
    assert len(sizes) > 100
    for format in ("orbax", "meta", "hf"):
        assert verify(open_checkpoint(folder), to(folder, tmp_path / format, format, meta_files=8), CONFIG) == 21


# What can go wrong.


def test_verify_finds_one_bit(model: tuple[Path, State], tmp_path: Path):
    folder, _ = model
    to(folder, tmp_path / "new", "hf")
    file = tmp_path / "new" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x80  # the sign of the last value of the output
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs .* in 1 or more .* output\[135, 63\]: "):
        verify(open_checkpoint(folder), open_checkpoint(tmp_path / "new"), CONFIG)


def test_verify_finds_another_config(model: tuple[Path, State], tmp_path: Path):
    folder, _ = model
    to(folder, tmp_path / "new", "hf")
    with pytest.raises(ConfigError, match="norm_eps: the config says 1e-05"):
        verify(open_checkpoint(folder), open_checkpoint(tmp_path / "new"), CONFIG.replace(norm_eps=1e-5))


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        (CONFIG, 3, r"3 files cannot hold 16 heads, 8 kv heads, .* Numbers that can: 1, 2, 4, 8\.$"),
        (CONFIG.replace(vocab_size=134), 4, r"vocab_size 134 in equal parts\. Numbers that can: 1, 2\.$"),
        (CONFIG.replace(head_dim=12), 1, r"Meta's layout has no head_dim"),
    ],
)
def test_what_meta_files_cannot_hold(tmp_path: Path, config: LlamaConfig, files: int, message: str):
    save_hf_model(tmp_path / "hf", config)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        to(tmp_path / "hf", tmp_path / "meta", "meta", config, meta_files=files)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("format", ["hf", "meta", "orbax"])
def test_nothing_is_overwritten(model: tuple[Path, State], tmp_path: Path, format: str):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="new already exists"):
        to(model[0], tmp_path / "new", format)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("format", ["hf", "meta", "orbax"])
def test_a_full_disk(model: tuple[Path, State], tmp_path: Path, format: str):
    """A limit on the size of a file stands for it: writing fails in the middle of a tensor."""
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
from sharded_llama.checkpoint import ExportFormat, convert, open_checkpoint
source = open_checkpoint(sys.argv[1])
from sharded_llama.errors import CheckpointError
try:
    convert(source, source.read_config(), sys.argv[2], ExportFormat({format!r}))
except CheckpointError as e:
    print(e)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, model[0], tmp_path / "new"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "cannot be written: " in done.stdout, done
    assert not list(tmp_path.iterdir())


def test_too_little_space(model: tuple[Path, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(CheckpointError, match=r"new: cannot be written: it needs 0\.00 GB, but"):
        to(model[0], tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["hf", "meta", "orbax"])
def test_a_killed_run_leaves_nothing_that_loads(model: tuple[Path, State], tmp_path: Path, format: str):
    code = f"""
import os, signal, sys
from sharded_llama.checkpoint import ExportFormat, convert, export, open_checkpoint
source = open_checkpoint(sys.argv[1])
def blocks(source, config, real=export.source_blocks):
    for i, block in enumerate(real(source, config)):
        if i == 15:
            os.kill(os.getpid(), signal.SIGKILL)
        yield block
export.source_blocks = blocks
convert(source, source.read_config(), sys.argv[2], ExportFormat({format!r}))
"""
    done = subprocess.run([sys.executable, "-c", code, model[0], tmp_path / "new"], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith("new.partial-")
    for folder in (partial, tmp_path / "new"):
        with pytest.raises(CheckpointError):
            open_checkpoint(folder)
    to(model[0], tmp_path / "new", format)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]  # the leftover is gone too


def test_another_run_under_way_is_left_alone(model: tuple[Path, State], tmp_path: Path):
    host = os.uname().nodename
    kept = [tmp_path / name for name in (f"new.partial-{host}-1", "new.partial-elsewhere-999999", "new.partial-x")]
    for folder in kept:
        folder.mkdir()
    mine = tmp_path / f"new.partial-{host}-{os.getpid()}"  # in a container, of the run before
    mine.mkdir()
    (mine / "file").touch()
    to(model[0], tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"new", *(folder.name for folder in kept)}


def test_a_source_of_another_model(model: tuple[Path, State], tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"missing tensors: .* and 4 more"):
        to(model[0], tmp_path / "new", config=CONFIG.replace(n_layers=3))
    with pytest.raises(CheckpointError, match="'gguf' is not a format to write: it must be one of hf, meta, orbax"):
        ExportFormat("gguf")
    assert not list(tmp_path.iterdir())


# What a checkpoint is.


def test_describe(model: tuple[Path, State]):
    text = describe(open_checkpoint(model[0]), CONFIG)
    assert "Hugging Face safetensors\n21 tensors (21 bfloat16), " in text
    assert "factor=32.0" in text
    line = next(line for line in text.splitlines() if "{i}.wk " in line)
    assert line.split() == ["layers.{i}.wk", "32", "x", "64", "bfloat16", "8,192", "bytes", "in", "2", "tensors"]


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 8), (1, 16)], ids=str)
def test_describe_mesh_counts_what_a_device_holds(model: tuple[Path, State], shape: tuple[int, int]):
    text = describe_mesh(CONFIG, {"data": shape[0], "model": shape[1]})
    stated = int(text.split("holds ")[1].split(" ")[0].replace(",", ""))
    assert f"Each of {shape[0] * shape[1]} devices" in text
    assert ("2 devices share a kv head" in text) == (shape[1] == 16)
    if shape[1] <= 8:
        weights = load_weights(open_checkpoint(model[0]), CONFIG, mesh=make_mesh(*shape))
        assert stated == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(weights))


def test_describe_a_mesh_that_does_not_fit():
    with pytest.raises(MeshError, match="Sizes that work: 1, 2, 4, 8, 16"):
        describe_mesh(CONFIG, {"data": 1, "model": 3})
