"""Damaged settings beside weights: Meta's params.json with its sidecar, and Hugging Face's config.json.

They are refused as such, or they describe a model: then either its tensors are not those of the checkpoint, which the
reader says, or all of them can be read. `--fuzz=N`: N examples of each kind.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hf_models import hf_config, state_of
from hypothesis import given
from hypothesis.strategies import SearchStrategy
from json_mutations import Raw, damaged_json
from meta_models import save_meta
from mutations import fuzz_settings, guarded

from sharded_llama.checkpoint import open_checkpoint
from sharded_llama.checkpoint.reader import check_tensors
from sharded_llama.config import MAX_LAYERS, MAX_SIZE, LlamaConfig, RopeScaling
from sharded_llama.errors import CheckpointError, ConfigError
from sharded_llama.hf_config import read_config, read_generation_config

CONFIG = LlamaConfig(
    dim=8,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=2,
    ffn_dim=24,
    vocab_size=10,
    norm_eps=1e-6,
    rope_theta=10_000.0,
    rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192),
    max_seq_len=512,
    bos_id=1,
    eos_ids=(2, 3),
    dtype="float32",
)
PARAMS = {
    "dim": 8,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 8,
    "ffn_dim_multiplier": 1.0,
    "norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "use_scaled_rope": True,
    "vocab_size": -1,
}
SIDECAR = {
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192},
    "max_seq_len": 512,
    "bos_id": 1,
    "eos_ids": [2, 3],
    "tie_embeddings": False,
}
HF = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 10,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_multiplier": 2**-0.5,
    "layer_types": ["full_attention", "full_attention"],
    "quantization_config": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "torch_dtype": "float32",
    "use_cache": True,
}
GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.0, "eos_token_id": [2, 3]}
NUMBERS = [*(Raw(str(n)) for n in (3, 5, 8, 10, 16, 24, 32, 128, 10**9, 2**31 - 1, 10**10, 10**400)), 1e-300, 1e300]
FIELDS = [*PARAMS, *SIDECAR, "factor", "max_seq_len", "ffn_dim", "moe_args", "dtype", "\U0001f600"]
HF_FIELDS = [
    *HF,
    *GENERATION,
    "head_dim",
    "rope_parameters",
    "partial_rotary_factor",
    "sliding_window",
    "dtype",
    "type",
]
HF_VALUES = ["llama", "llama3", "default", "float16", "torch.bfloat16", "silu", "gelu", "full_attention", "mistral"]


@pytest.fixture(autouse=True)
def _formatted_logs() -> Iterator[None]:
    """Log messages are formatted, as they would be to show them: that may fail, too."""
    logger, handler = logging.getLogger("sharded_llama"), Formatting()
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


class Formatting(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        self.format(record)


def run(
    request: pytest.FixtureRequest, damage: SearchStrategy[bytes], judge: Callable[[bytes], str], *ends: str
) -> None:
    """Judges damaged files. Each of the ends must occur, and no other."""
    verdicts: Counter[str] = Counter()

    @fuzz_settings(request)
    @given(damage)
    def check(text: bytes) -> None:
        verdicts[judge(text)] += 1

    check()
    assert verdicts.keys() == set(ends), verdicts


def judge_meta(folder: Path) -> str:
    """What comes of a folder: "refused", "another model", or "read"."""
    with guarded(1 << 20):
        try:
            source = open_checkpoint(folder)
            config = source.read_config()
        except CheckpointError as e:
            return end("refused", str(e), folder)
        try:
            check_tensors(source, config)
        except CheckpointError as e:
            return end("another model", str(e), folder)
        for name, info in source.tensors.items():
            out = np.full(info.shape, np.nan, info.dtype)
            source.read(name, tuple(slice(None) for _ in info.shape), out)
            assert np.isfinite(out).all()
    return "read"


def end(verdict: str, message: str, folder: Path) -> str:
    """The verdict, when the message names the folder and can be printed."""
    message.encode()
    return verdict if message.startswith(str(folder)) else f"{verdict} without naming the file: {message}"


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, params.json and the sidecar."""
    folder = tmp_path_factory.mktemp("meta")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(hf_config(CONFIG))
    save_meta(folder, state_of(model), CONFIG, files=2, params=PARAMS)
    (folder / "sharded_llama.json").write_text(json.dumps(SIDECAR))
    return folder


@pytest.fixture
def files(meta: Path) -> Iterator[Path]:
    """The folder, whose settings are put back afterwards."""
    yield meta
    (meta / "params.json").write_text(json.dumps(PARAMS))
    (meta / "sharded_llama.json").write_text(json.dumps(SIDECAR))


def test_an_undamaged_folder_is_read(files: Path):
    assert judge_meta(files) == "read"
    assert open_checkpoint(files).read_config() == CONFIG


@pytest.mark.parametrize(("file", "content"), [("params.json", PARAMS), ("sharded_llama.json", SIDECAR)])
def test_damage_to_metas_settings(request: pytest.FixtureRequest, files: Path, file: str, content: dict):
    def judge(text: bytes) -> str:
        (files / file).write_bytes(text)
        return judge_meta(files)

    ends = ["refused", "read"] + ["another model"] * (content is PARAMS)
    run(request, damaged_json(json.dumps(content).encode(), [*NUMBERS, *FIELDS]), judge, *ends)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_damage_to_hugging_faces_settings(request: pytest.FixtureRequest, tmp_path: Path, file: str):
    contents = {"config.json": HF, "generation_config.json": GENERATION}
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert read_config(tmp_path) == CONFIG

    def judge(text: bytes) -> str:
        (tmp_path / file).write_bytes(text)
        verdicts = []
        for read in (read_config, read_generation_config):
            with guarded(1 << 20):
                try:
                    result = read(tmp_path)
                except ConfigError as e:
                    verdicts.append(end("refused", str(e), tmp_path))
                else:
                    assert isinstance(result, LlamaConfig if read is read_config else dict)
                    verdicts.append("read")
        return max(verdicts, key=len)

    values = [*NUMBERS, *HF_FIELDS, *HF_VALUES]
    run(request, damaged_json(json.dumps(contents[file]).encode(), values), judge, "refused", "read")


@pytest.mark.parametrize("value", [10**9, 2**31 - 1, 2**31, 10**400])
@pytest.mark.parametrize("field", ["dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of"])
def test_huge_numbers_in_params(files: Path, field: str, value: int):
    (files / "params.json").write_text(json.dumps(PARAMS | {field: value}))
    assert judge_meta(files) != "read"
    if value > MAX_SIZE or field == "n_layers":
        with pytest.raises(CheckpointError, match=rf"params\.json: {field}=10*|{field}=214748364\d.* at most"):
            open_checkpoint(files)


@pytest.mark.parametrize("field", ["rope_theta", "norm_eps", "ffn_dim_multiplier"])
def test_numbers_beyond_float64(files: Path, field: str):
    (files / "params.json").write_text(json.dumps(PARAMS | {field: 10**400}))
    with pytest.raises(CheckpointError, match=rf"params\.json: {field}=10+.* must be a finite number"):
        open_checkpoint(files)


def test_bounds_of_a_config():
    assert CONFIG.replace(n_layers=MAX_LAYERS).n_layers == MAX_LAYERS == 10_000
    with pytest.raises(ConfigError, match="n_layers=10001 must be at most 10000"):
        CONFIG.replace(n_layers=MAX_LAYERS + 1)
    for name in ("dim", "n_heads", "ffn_dim", "vocab_size", "max_seq_len"):
        assert getattr(CONFIG.replace(**{name: MAX_SIZE - 1}), name) == MAX_SIZE - 1
        with pytest.raises(ConfigError, match=f"{name}={MAX_SIZE + 1} must be at most {MAX_SIZE}"):
            CONFIG.replace(**{name: MAX_SIZE + 1})


@pytest.mark.parametrize("depth", range(900, 1000, 3))
def test_values_nested_as_deeply_as_can_be_parsed(tmp_path: Path, files: Path, depth: int):
    nested = "[" * depth + "]" * depth
    for name in ("params.json", "sharded_llama.json"):
        (files / name).write_text(
            json.dumps(PARAMS if name == "params.json" else SIDECAR).replace("}", f', "a": {nested}}}')
        )
        assert judge_meta(files) == "refused"
    for old, new in (("2, 3]", f"2, {nested}]"), ("24", nested)):
        (tmp_path / "config.json").write_text(json.dumps(HF).replace(old, new))
        with pytest.raises(ConfigError, match=r"config\.json"):
            read_config(tmp_path)


def test_the_file_that_is_wrong_is_named(files: Path):
    (files / "params.json").write_text(json.dumps(PARAMS | {"n_kv_heads": 3}))
    with pytest.raises(CheckpointError, match=r"params\.json: n_heads=4 must be a multiple of n_kv_heads=3"):
        open_checkpoint(files)
    (files / "params.json").write_text(json.dumps(PARAMS))
    (files / "sharded_llama.json").write_text(json.dumps(SIDECAR | {"tie_embeddings": 1}))
    with pytest.raises(CheckpointError, match=r"sharded_llama\.json: tie_embeddings=1 must be True or False"):
        open_checkpoint(files)


@pytest.mark.parametrize("name", ["tok_embeddings", "norm", "layers.0.wq"])
def test_a_tensor_under_a_canonical_name(tmp_path: Path, name: str):
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    torch.save({"tok_embeddings.weight": torch.ones(10, 8), name: torch.tensor(1.0)}, tmp_path / "consolidated.00.pth")
    with pytest.raises(
        CheckpointError, match=rf"consolidated\.00\.pth: tensor {name} should be called .*{name[-2:]}.*"
    ):
        open_checkpoint(tmp_path)
