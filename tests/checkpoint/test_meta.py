"""Meta checkpoints: every array equals the Hugging Face one of the same model; params.json and what it cannot say."""

import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from hf_models import State, assert_bits_equal, expected_weights, save_random_model
from meta_models import CONFIG, PARAMS, save_meta, to_meta_names

from sharded_llama import meta_config
from sharded_llama.checkpoint import load_weights, open_checkpoint, reader, reads
from sharded_llama.checkpoint.layout import canonical_shapes
from sharded_llama.config import LlamaConfig, RopeScaling
from sharded_llama.errors import CheckpointError, ConfigError
from sharded_llama.mesh import make_mesh

MESHES = [(1, 1), (2, 4), (1, 8), (4, 2)]


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaConfig, State]:
    config = CONFIG.replace(dtype=request.param)
    return config, save_random_model(tmp_path_factory.mktemp("hf"), config)


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    folder = tmp_path_factory.mktemp("meta")
    state = save_random_model(tmp_path_factory.mktemp("hf"), CONFIG)
    save_meta(folder, state, CONFIG, files=2)
    return folder, state


@pytest.fixture
def copy(float32: tuple[Path, State], tmp_path: Path) -> Path:
    return Path(shutil.copytree(float32[0], tmp_path / "copy"))


def load(folder: Path, config: LlamaConfig, shape: tuple[int, int]):
    return load_weights(open_checkpoint(folder), config, mesh=make_mesh(*shape))


@pytest.mark.parametrize("embeddings", ["width", "vocabulary"])
@pytest.mark.parametrize("files", [1, 2, 4, 8])
def test_weights_equal_the_hugging_face_ones(model, tmp_path: Path, files: int, embeddings: str):
    config, state = model
    save_meta(tmp_path, state, config, files=files, embeddings=embeddings)
    source = open_checkpoint(tmp_path)
    assert source.format == "Meta"
    assert source.read_config() == config
    assert source.tensors.keys() == canonical_shapes(config).keys()
    for shape in MESHES:
        weights = load_weights(source, config, mesh=make_mesh(*shape))
        jax.tree.map(assert_bits_equal, weights, expected_weights(state, config, shape[1]))


def test_weights_are_converted(float32: tuple[Path, State]):
    folder, state = float32
    config = CONFIG.replace(dtype="bfloat16")
    jax.tree.map(assert_bits_equal, load(folder, config, (2, 4)), expected_weights(state, config, 4))


@pytest.mark.parametrize("rows", [slice(0, 64), slice(4, 12), slice(1, 3), slice(3, 9), slice(5, 6), slice(30, 37)])
@pytest.mark.parametrize("columns", [slice(0, 64), slice(5, 18)])
def test_any_slice_of_permuted_rows(float32: tuple[Path, State], rows: slice, columns: slice):
    folder, state = float32
    source = open_checkpoint(folder)
    for name, proj in (("wq", "q_proj"), ("wk", "k_proj")):
        expected = state[f"model.layers.1.self_attn.{proj}.weight"]
        rows = slice(rows.start, min(rows.stop, len(expected)))
        for out in (np.full((rows.stop - rows.start, columns.stop - columns.start, 2), np.nan, np.float32),):
            count = source.read(f"layers.1.{name}", (rows, columns), out[..., 0])
            assert_bits_equal(out[..., 0], expected[rows, columns])
            assert np.isnan(out[..., 1]).all()
            assert count == out[..., 0].nbytes


def test_small_blocks_and_parts(float32: tuple[Path, State], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reads, "BLOCK_BYTES", 700)
    monkeypatch.setattr(reader, "_unit_bytes", lambda mesh: 3_000)
    folder, state = float32
    jax.tree.map(assert_bits_equal, load(folder, CONFIG, (1, 8)), expected_weights(state, CONFIG, 8))


def test_permuted_rows_give_the_same_scores():
    """Meta's rotary embedding of neighbours, in complex numbers, against the half-split one of Hugging Face."""
    rng = torch.Generator().manual_seed(0)
    wq, wk = (torch.randn(n, 64, generator=rng, dtype=torch.float64) for n in (64, 32))
    names = {"q": "model.layers.0.self_attn.q_proj.weight", "k": "model.layers.0.self_attn.k_proj.weight"}
    meta = to_meta_names({names["q"]: wq, names["k"]: wk}, CONFIG)
    x = torch.randn(11, 64, generator=rng, dtype=torch.float64)
    angles = torch.arange(11)[:, None] * 10_000.0 ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)

    def neighbours(w: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex((x @ w.T).reshape(11, -1, 2, 2))
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None].to(pairs.dtype)
        return torch.view_as_real(turned).flatten(2)

    def halves(w: torch.Tensor) -> torch.Tensor:
        a, b = (x @ w.T).reshape(11, -1, 2, 2).unbind(2)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    scores = [
        torch.einsum("lhk,mhk->hlm", turn(q)[:, ::2], turn(k))
        for turn, q, k in (
            (halves, wq, wk),
            (neighbours, meta["layers.0.attention.wq.weight"], meta["layers.0.attention.wk.weight"]),
        )
    ]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-12, atol=1e-12)


# What params.json says, and what it cannot say.

LLAMA3 = {
    "dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5, "rope_theta": 500_000.0, "vocab_size": 128_256,
}  # fmt: skip
PUBLISHED = {  # params.json of published checkpoints -> feed-forward width
    "Llama-2-7b": ({"dim": 4096, "multiple_of": 256}, 11008),
    "Llama-2-70b": ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),
    "Llama-3.1-8B": ({"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),
    "Llama-3.1-405B": ({"dim": 16384, "multiple_of": 4096, "ffn_dim_multiplier": 1.2}, 53248),
    "Llama-3.2-1B": ({"dim": 2048, "multiple_of": 256, "ffn_dim_multiplier": 1.5}, 8192),
    "Llama-3.2-3B": ({"dim": 3072, "multiple_of": 256, "ffn_dim_multiplier": 1.0}, 8192),
}


def read(folder: Path, params: dict, sidecar: dict | None = None, **given) -> LlamaConfig:
    (folder / "params.json").write_text(json.dumps(params))
    if sidecar is not None:
        (folder / "sharded_llama.json").write_text(json.dumps(sidecar))
    given = {"vocab_size": 128_256, "dtype": "bfloat16", "tied": False} | given
    return meta_config.read_config(folder, meta_config.read_params(folder), meta_config.read_sidecar(folder), **given)


@pytest.mark.parametrize("name", PUBLISHED)
def test_feed_forward_widths(name: str):
    params, width = PUBLISHED[name]
    assert meta_config.ffn_dim(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier")) == width


def test_llama_2(tmp_path: Path):
    params = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1}
    config = read(tmp_path, params, vocab_size=32_000, dtype="float16")
    assert config == LlamaConfig(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, ffn_dim=11008, vocab_size=32_000,
        norm_eps=1e-5, rope_theta=10_000.0, max_seq_len=4096, bos_id=1, eos_ids=(2,), dtype="float16",
    )  # fmt: skip


def test_the_default_theta_is_that_of_the_family(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    params = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    with caplog.at_level(logging.INFO):
        assert read(tmp_path, params).rope_theta == 500_000.0
    assert "rope_theta=500000.0" in caplog.text
    assert read(tmp_path, params | {"use_scaled_rope": True, "vocab_size": 99}, vocab_size=99).rope_theta == 500_000.0


def test_defaults_where_absent(tmp_path: Path):
    config = read(tmp_path, {"dim": 64, "n_layers": 1, "n_heads": 4}, vocab_size=100)
    assert (config.n_kv_heads, config.norm_eps, config.rope_theta, config.ffn_dim) == (4, 1e-5, 10_000.0, 256)
    assert config.rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "factor", "max_seq_len"),
    [
        ({}, None, 8192),
        ({"use_scaled_rope": False}, None, 8192),
        ({"use_scaled_rope": True}, 8.0, 131_072),
        ({"use_scaled_rope": True, "dim": 2048, "n_layers": 16, "n_heads": 32}, 32.0, 131_072),
        ({"use_scaled_rope": True, "dim": 3072, "n_layers": 28, "n_heads": 24}, 32.0, 131_072),
    ],
)
def test_llama_3_rope(tmp_path: Path, changes: dict, factor: float | None, max_seq_len: int, caplog):
    with caplog.at_level(logging.INFO):
        config = read(tmp_path, LLAMA3 | changes)
    assert config.rope_scaling == (
        factor and RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
    )
    assert (config.max_seq_len, config.bos_id, config.eos_ids) == (max_seq_len, 128_000, (128_001, 128_008, 128_009))
    assert f"max_seq_len={max_seq_len}" in caplog.text
    assert (f"factor={factor}" in caplog.text) == (factor is not None)


def test_who_says_the_rope_factor(tmp_path: Path):
    """The argument, then the sidecar, then what is known of the shapes."""
    params = LLAMA3 | {"use_scaled_rope": True}
    assert read(tmp_path, params).rope_scaling.factor == 8.0
    assert read(tmp_path, params, rope_factor=4.0).rope_scaling.factor == 4.0
    assert read(tmp_path, params, {"rope_scaling": SCALING}).rope_scaling.factor == 16.0
    assert read(tmp_path, params, {"rope_scaling": SCALING}, rope_factor=4.0).rope_scaling.factor == 4.0
    with pytest.raises(ConfigError, match=r"rope factor was given, but its params\.json has no use_scaled_rope"):
        read(tmp_path, LLAMA3, {}, rope_factor=4.0)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        CONFIG.replace(tie_embeddings=True, eos_ids=(3, 4), bos_id=None, max_seq_len=99),
        CONFIG.replace(ffn_dim=173, rope_scaling=RopeScaling(
            factor=32.0, low_freq_factor=1.5, high_freq_factor=4.0, original_max_seq_len=64)),
        CONFIG.replace(ffn_dim=1, dim=16, n_heads=4, n_kv_heads=4),
        CONFIG.replace(dim=4096, head_dim=256, ffn_dim=14336),
    ],
)  # fmt: skip
def test_what_is_written_is_read_back(tmp_path: Path, config: LlamaConfig):
    params, sidecar = meta_config.to_params(config), meta_config.to_sidecar(config)
    again = read(tmp_path, params, json.loads(json.dumps(sidecar)), vocab_size=136, dtype=config.dtype, tied=True)
    assert again == config
    if config.ffn_dim == 14336:
        assert (params["multiple_of"], params["ffn_dim_multiplier"]) == (1024, 1.3)


def test_a_head_width_that_meta_cannot_say():
    with pytest.raises(ConfigError, match=r"has no head_dim: it is dim / n_heads = 4, but this model's is 12"):
        meta_config.to_params(CONFIG.replace(head_dim=12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": None}, r"params\.json: dim is missing\.$"),
        ({"dim": "64"}, r"params\.json: dim='64' must be a whole number"),
        ({"n_heads": 5}, r"params\.json: dim=64 must be a multiple of n_heads=5\.$"),
        ({"n_heads": True}, r"params\.json: n_heads=True must be a whole number"),
        ({"n_kv_heads": 3}, r"n_heads=16 must be a multiple of n_kv_heads=3\.$"),
        ({"norm_eps": 0}, r"params\.json: norm_eps=0 must be a finite number greater than 0\.$"),
        ({"ffn_dim_multiplier": 1e300}, r"feed-forward width beyond"),
        ({"vocab_size": 100}, r"params\.json: vocab_size=100, but the embeddings have 136 rows\.$"),
        ({"use_scaled_rope": "yes"}, r"use_scaled_rope='yes' must be true or false\.$"),
        ({"vision_chunk_size": 448}, r"params\.json: vision_chunk_size=448 is not supported"),
        ({"quantization_args": {"group_size": 32}}, r"quantization_args=.* is not supported"),
        ({"moe_args": {"num_experts": 16}}, r"moe_args=.* is not supported"),
        ({"use_qk_norm": True}, r"use_qk_norm=True is not supported"),
        ({"dim": 96}, r"tok_embeddings\.weight is \(68, 64\); with 2 files and dim=96, expected rows of 96"),
        ({"multiple_of": 256}, r"misshapen tensors: layers\.0\.feed_forward\.w1\.weight is \(176, 64\), should be"),
        ({"n_layers": 3}, r"missing tensors: layers\.2\.attention_norm\.weight \(64,\)"),
        ({"n_layers": 1}, r"extra tensors: layers\.1\.attention"),
        ({"n_kv_heads": 4}, r"misshapen tensors: layers\.0\.attention\.wk\.weight is \(32, 64\), should be \(16, 64\)"),
    ],
)
def test_params_of_another_model(copy: Path, change: dict, message: str):
    (copy / "params.json").write_text(json.dumps({k: v for k, v in (PARAMS | change).items() if v is not None}))
    with pytest.raises(CheckpointError, match=message):
        load(copy, open_checkpoint(copy).read_config(), (1, 2))


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", "[" * 100_000])
def test_params_that_are_no_json(copy: Path, text: str):
    (copy / "params.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"params\.json (is not valid JSON|must hold a JSON object)"):
        open_checkpoint(copy)


SCALING = {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ({"eos_id": 2}, r"sharded_llama\.json: 'eos_id' is not one of its fields: bos_id, eos_ids"),
        ({"max_seq_len": 0}, r"sharded_llama\.json: max_seq_len=0 must be a whole number of at least 1"),
        ({"eos_ids": [136]}, r"sharded_llama\.json: eos_ids: 136 is not a token id in 0\.\.135"),
        ({"tie_embeddings": "no"}, r"tie_embeddings='no' must be True or False"),
        ({"rope_scaling": {"factor": 2.0}}, r"sharded_llama\.json: rope_scaling lacks low_freq_factor"),
        (
            {
                "rope_scaling": {
                    "factor": 2.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_seq_len": 9,
                }
            },
            r"rope_scaling=.* does not go with use_scaled_rope=False",
        ),
    ],
)
def test_a_wrong_sidecar(copy: Path, sidecar: dict, message: str):
    (copy / "sharded_llama.json").write_text(json.dumps(sidecar))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy)


# Files that do not belong together.


def rewrite(file: Path, **changes: torch.Tensor | None) -> None:
    tensors = torch.load(file, weights_only=True) | {name.replace("__", "."): x for name, x in changes.items()}
    torch.save({name: x for name, x in tensors.items() if x is not None}, file)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("norm__weight", None, r"consolidated\.01\.pth: lacks tensor norm\.weight, which the other files have"),
        ("extra", torch.zeros(3), r"consolidated\.00\.pth: lacks tensor extra, which the other files have"),
        (
            "output__weight",
            torch.zeros(67, 64),
            r"01\.pth: tensor output\.weight is float32 \(67, 64\), but",
        ),
        ("norm__weight", torch.zeros(64).half(), r"01\.pth: tensor norm\.weight is float16 \(64,\), but float32"),
    ],
)
def test_ranks_that_disagree(copy: Path, name: str, tensor: torch.Tensor | None, message: str):
    rewrite(copy / "consolidated.01.pth", **{name: tensor})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy)


def test_missing_files(copy: Path, tmp_path: Path):
    (copy / "consolidated.00.pth").rename(copy / "consolidated.03.pth")
    message = r"copy: 2 of 4 or more files missing: consolidated\.00\.pth, consolidated\.02\.pth\.$"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy)
    for file in copy.glob("*.pth"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"params\.json but no weights: consolidated\.00\.pth is missing"):
        open_checkpoint(copy)


def test_the_last_file_missing(copy: Path):
    """Half of the ranks look like a complete checkpoint until their shapes are compared with params.json."""
    (copy / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"copy: has 1 of 2 files; missing: consolidated\.01\.pth\.$"):
        open_checkpoint(copy)


def test_more_files_than_supported(copy: Path):
    for rank in range(2, 16):
        shutil.copyfile(copy / "consolidated.00.pth", copy / f"consolidated.{rank:02}.pth")
    with pytest.raises(CheckpointError, match=r"has 16 files; checkpoints of 1 to 8 are supported"):
        open_checkpoint(copy)


def test_files_of_other_names(copy: Path):
    (copy / "consolidated.1.pth").write_text("")
    with pytest.raises(CheckpointError, match=r"consolidated\.1\.pth: expected names consolidated\.00\.pth"):
        open_checkpoint(copy)


def test_no_params(copy: Path):
    (copy / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"params\.json does not exist"):
        open_checkpoint(copy)


def test_a_folder_around_a_checkpoint(copy: Path):
    with pytest.raises(CheckpointError, match=r"holds no checkpoint itself; .*/copy has one in Meta's format"):
        open_checkpoint(copy.parent)


def test_a_rope_factor_for_hugging_face(tmp_path: Path):
    save_random_model(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match="a rope factor was given, but its own config says it"):
        open_checkpoint(tmp_path, rope_factor=8.0)


# Tied embeddings.


def tied_state(state: State, *, equal: bool, last: float | None = None) -> State:
    output = state["model.embed_tokens.weight"].copy() if equal else state["lm_head.weight"]
    if last is not None:
        output[-1, -1] = last
    return state | {"lm_head.weight": output}


def test_an_output_that_shares_its_bytes_is_tied(float32: tuple[Path, State], tmp_path: Path):
    _, state = float32
    save_meta(tmp_path, state, CONFIG)
    assert not open_checkpoint(tmp_path).read_config().tie_embeddings
    tensors = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    shared = open_checkpoint(tmp_path).read_config()
    assert shared == CONFIG.replace(tie_embeddings=True)
    weights = load(tmp_path, shared, (1, 4))
    jax.tree.map(assert_bits_equal, weights, expected_weights(state, shared, 4))


def test_a_missing_output(float32: tuple[Path, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is damage, unless the sidecar or the shapes of Llama 3.2 say that the embeddings are tied."""
    _, state = float32
    save_meta(tmp_path, state, CONFIG, params=PARAMS | {"use_scaled_rope": True})
    rewrite(tmp_path / "consolidated.00.pth", output__weight=None)
    config = open_checkpoint(tmp_path).read_config()
    with pytest.raises(CheckpointError, match=r"missing tensors: output\.weight \(136, 64\)\.$"):
        load(tmp_path, config, (1, 1))
    (tmp_path / "sharded_llama.json").write_text(json.dumps({"tie_embeddings": True}))
    assert open_checkpoint(tmp_path).read_config().tie_embeddings
    (tmp_path / "sharded_llama.json").unlink()
    monkeypatch.setattr(meta_config, "LLAMA32_SHAPES", {(64, 2)})
    assert open_checkpoint(tmp_path).read_config().tie_embeddings


def test_equal_copies_are_tied_in_llama_3_2_alone(
    float32: tuple[Path, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, state = float32
    params = PARAMS | {"use_scaled_rope": True}

    def tied(state: State, sidecar: dict | None = None) -> bool:
        save_meta(tmp_path, state, CONFIG, files=2, params=params)
        if sidecar:
            (tmp_path / "sharded_llama.json").write_text(json.dumps(sidecar))
        return open_checkpoint(tmp_path).read_config().tie_embeddings

    assert not tied(tied_state(state, equal=True))
    monkeypatch.setattr(meta_config, "LLAMA32_SHAPES", {(64, 2)})
    assert tied(tied_state(state, equal=True))
    assert not tied(tied_state(state, equal=True, last=1e-30))
    assert not tied(tied_state(state, equal=False))
    assert not tied(tied_state(state, equal=True), {"tie_embeddings": False})
    assert tied(tied_state(state, equal=False), {"tie_embeddings": True})
