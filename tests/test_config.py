"""LlamaConfig from real and made-up config.json files: read as transformers reads them, or refused by name."""

import json
import logging
import math
from pathlib import Path

import pytest
import transformers

from sharded_llama.config import LlamaConfig, RopeScaling, check_matches
from sharded_llama.errors import ConfigError
from sharded_llama.hf_config import read_generation_config

DATA = Path(__file__).parents[1] / "../shared/data/hf_configs"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="needs the real config.json files of ../shared/data/hf_configs"
)

SMALL = LlamaConfig(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    ffn_dim=96,
    vocab_size=128,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_seq_len=256,
    bos_id=1,
    eos_ids=(2,),
)

# The same model as a config.json of transformers 4.
RAW = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LLAMA3_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=128)


def write(folder: Path, raw: object = RAW, /, name: str = "config.json", **changes: object) -> Path:
    """Writes `raw` with some fields changed (... removes one) and returns the folder."""
    if isinstance(raw, dict):
        raw = {key: value for key, value in (raw | changes).items() if value is not ...}
    (folder / name).write_text(json.dumps(raw))
    return folder


def as_transformers_sees(path: Path) -> LlamaConfig:
    """Our config, filled from the attributes of transformers' own LlamaConfig for the same file."""
    file = path / "config.json" if path.is_dir() else path
    theirs = transformers.LlamaConfig.from_dict(json.loads(file.read_text()))
    rope = theirs.rope_parameters
    eos = theirs.eos_token_id
    return LlamaConfig(
        dim=theirs.hidden_size,
        n_layers=theirs.num_hidden_layers,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        ffn_dim=theirs.intermediate_size,
        vocab_size=theirs.vocab_size,
        norm_eps=theirs.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope_scaling=RopeScaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_seq_len=rope["original_max_position_embeddings"],
        )
        if rope["rope_type"] == "llama3"
        else None,
        max_seq_len=theirs.max_position_embeddings,
        tie_embeddings=theirs.tie_word_embeddings,
        bos_id=theirs.bos_token_id,
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        dtype=str(theirs.dtype or "bfloat16").removeprefix("torch."),
    )


# ---- Real files


@needs_data
@pytest.mark.parametrize(
    "name",
    [
        "Llama-2-7b-hf",
        "Llama-3.1-8B",
        "Llama-3.1-70B",
        "Llama-3.1-405B",
        "Llama-3.2-1B-Instruct",
        "Llama-3.2-3B-Instruct",
    ],
)
def test_real_configs_as_transformers_reads_them(name, caplog):
    file = DATA / f"{name}.json"
    assert LlamaConfig.from_hf(file) == as_transformers_sees(file)
    assert not caplog.records


@needs_data
def test_a_real_config_field_by_field():
    assert LlamaConfig.from_hf(DATA / "Llama-3.2-1B-Instruct.json") == LlamaConfig(
        dim=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        head_dim=64,
        ffn_dim=8192,
        vocab_size=128256,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192),
        max_seq_len=131072,
        tie_embeddings=True,
        bos_id=128000,
        eos_ids=(128001, 128008, 128009),
        dtype="bfloat16",
    )


@needs_data
@pytest.mark.parametrize(
    ("name", "model_type"), [("Mistral-7B-Instruct-v0.3", "mistral"), ("Qwen2.5-7B-Instruct", "qwen2")]
)
def test_other_models_are_refused_by_name(name, model_type):
    with pytest.raises(ConfigError, match=rf"{name}\.json: model_type='{model_type}' is not supported"):
        LlamaConfig.from_hf(DATA / f"{name}.json")


@needs_data
def test_real_generation_config(tmp_path):
    raw = json.loads((DATA / "Llama-3.1-8B-Instruct.generation_config.json").read_text())
    write(tmp_path, json.loads((DATA / "Llama-3.1-8B.json").read_text()))
    write(tmp_path, raw, name="generation_config.json")
    assert LlamaConfig.from_hf(tmp_path).eos_ids == (128001, 128008, 128009)
    expected = {"do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.0}
    assert read_generation_config(tmp_path) == expected


# ---- Both forms


def test_folder_and_file_are_the_same(tmp_path):
    write(tmp_path)
    assert LlamaConfig.from_hf(tmp_path) == LlamaConfig.from_hf(str(tmp_path / "config.json")) == SMALL


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": None},
        {"rope_theta": 5e5},
        {"rope_theta": ...},
        {"rope_scaling": LLAMA3_ROPE},
        {"rope_scaling": LLAMA3_ROPE | {"rope_type": ..., "type": "llama3"}},
        {"rope_scaling": LLAMA3_ROPE | {"rope_type": "llama3", "type": "linear"}},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": ...}, "max_position_embeddings": 512},
        {"rope_scaling": LLAMA3_ROPE | {"rope_theta": 7e5}},
        {"rope_theta": ..., "rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}},
        {"rope_theta": 3e5, "rope_parameters": LLAMA3_ROPE},
        {"rope_theta": 3e5, "rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}},
        {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 12345}},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3_ROPE},
        {"rope_parameters": None},
        {"rms_norm_eps": ...},
        {"max_position_embeddings": ...},
        {"num_key_value_heads": ...},
        {"num_key_value_heads": None},
        {"head_dim": 32},
        {"head_dim": None},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"bos_token_id": None, "eos_token_id": None},
        {"bos_token_id": ..., "eos_token_id": ...},
        {"eos_token_id": [2, 3, 5]},
        {"eos_token_id": []},
        {"torch_dtype": "float16"},
        {"torch_dtype": ..., "dtype": "float32"},
        {"torch_dtype": "float16", "dtype": "float32"},
        {"architectures": None},
        {"architectures": ...},
        {"pretraining_tp": 4, "attention_dropout": 0.1, "hidden_act": "swish"},
    ],
    ids=str,
)
def test_fields_mean_what_they_mean_to_transformers(tmp_path, changes):
    changes = {
        k: {a: b for a, b in v.items() if b is not ...} if isinstance(v, dict) else v for k, v in changes.items()
    }
    write(tmp_path, **changes)
    assert LlamaConfig.from_hf(tmp_path) == as_transformers_sees(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ({}, {}),
        ({"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}}, {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING}),
        ({"tie_word_embeddings": True}, {"tie_embeddings": True}),
        ({"head_dim": 8}, {"head_dim": 8}),
        ({"eos_token_id": [2, 7]}, {"eos_ids": (2, 7)}),
        ({"bos_token_id": None, "eos_token_id": None}, {"bos_id": None, "eos_ids": ()}),
        ({"dtype": "float16"}, {"dtype": "float16"}),
        ({"num_key_value_heads": 4}, {"n_kv_heads": 4}),
    ],
    ids=str,
)
def test_what_transformers_saves_is_read_back_without_warnings(tmp_path, caplog, arguments, changes):
    raw = {k: v for k, v in RAW.items() if k not in ("model_type", "architectures", "torch_dtype", "rope_theta")}
    arguments = raw | {"dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]} | arguments
    transformers.LlamaConfig(**arguments).save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    caplog.clear()
    assert LlamaConfig.from_hf(tmp_path) == SMALL.replace(**changes)
    assert not caplog.records


def test_default_values_are_those_of_transformers(tmp_path):
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    write(tmp_path, {name: RAW[name] for name in sizes} | {"model_type": "llama"})
    config = LlamaConfig.from_hf(tmp_path)
    assert config == as_transformers_sees(tmp_path)
    assert (config.norm_eps, config.rope_theta, config.max_seq_len, config.n_kv_heads) == (1e-6, 10000.0, 2048, 4)
    assert (config.tie_embeddings, config.bos_id, config.eos_ids, config.dtype) == (False, 1, (2,), "bfloat16")


def test_dtype_argument_wins(tmp_path):
    assert LlamaConfig.from_hf(write(tmp_path), dtype="float32").dtype == "float32"
    assert LlamaConfig.from_hf(write(tmp_path, torch_dtype="float8_e4m3fn"), dtype="float32").dtype == "float32"
    assert LlamaConfig.from_hf(write(tmp_path, torch_dtype="torch.float16")).dtype == "float16"
    with pytest.raises(ConfigError, match="dtype='float8_e4m3fn' is not supported"):
        LlamaConfig.from_hf(write(tmp_path, torch_dtype="float8_e4m3fn"))
    with pytest.raises(ConfigError, match="dtype='int8'"):
        LlamaConfig.from_hf(tmp_path, dtype="int8")


# ---- Refusals and warnings

REFUSED = {
    "hidden_act": ["gelu", "relu"],
    "attention_bias": [True],
    "mlp_bias": [True],
    "qkv_bias": [True],
    "partial_rotary_factor": [0.5],
    "rope_interleaved": [True],
    "sliding_window": [4096],
    "layer_types": [["full_attention", "sliding_attention"], "sliding_attention"],
    "no_rope_layers": [[1, 1, 1, 0]],
    "clip_qkv": [8.0],
    "attn_logit_softcapping": [50.0],
    "final_logit_softcapping": [30.0],
    "query_pre_attn_scalar": [256],
    "attention_multiplier": [0.0625],
    "logit_scale": [0.0625],
    "logits_scaling": [8.0],
    "embedding_multiplier": [12.0],
    "residual_multiplier": [0.22],
    "qk_norm": [True],
    "use_qk_norm": [True],
    "num_experts": [8],
    "num_local_experts": [8],
    "pruned_heads": [{"0": [1]}],
    "per_layer_config": [{"0": {"intermediate_size": 8}}],
    "is_encoder_decoder": [True],
    "quantization_config": [{"quant_method": "awq", "bits": 4}],
    "model_type": ["mistral", "qwen2", 3],
    "architectures": [
        ["MistralForCausalLM"],
        ["LlamaForSequenceClassification"],
        ["LlamaModel"],
        "LlamaForCausalLM",
        [[]],
    ],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_what_would_change_the_numbers_is_refused_by_name(tmp_path, name, value):
    write(tmp_path, **{name: value})
    with pytest.raises(ConfigError, match=rf"config\.json: {name}=.* is not supported"):
        LlamaConfig.from_hf(tmp_path)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope", "su", None, 3])
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_other_rotary_embeddings_are_refused_by_name(tmp_path, field, name, kind):
    write(tmp_path, **{field: {name: kind, "factor": 2.0}})
    with pytest.raises(ConfigError, match=rf"config\.json: {field}: rope_type={kind!r} is not supported"):
        LlamaConfig.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (LLAMA3_ROPE | {"factor": None}, "rope_scaling: factor is missing"),
        (LLAMA3_ROPE | {"factor": "8"}, "rope_scaling: factor='8' must be a finite number"),
        (LLAMA3_ROPE | {"high_freq_factor": 1.0}, "must be greater than"),
        (LLAMA3_ROPE | {"original_max_position_embeddings": 8192.5}, "original_max_position_embeddings=8192.5"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "rope_scaling: partial_rotary_factor=0.5"),
        ({"full_attention": {"rope_type": "default"}}, "rope_scaling: full_attention=.* differ by layer"),
        ("llama3", "rope_scaling='llama3' must be an object"),
    ],
)
def test_malformed_rope_scaling(tmp_path, rope, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_hf(write(tmp_path, rope_scaling=rope))


def test_neutral_values_are_accepted_silently(tmp_path, caplog):
    neutral = {
        "rope_interleaved": False,  # SmolLM
        "is_llama_config": True,
        "unsloth_fixed": True,
        "_name_or_path": "somewhere/vicuna-7b",
        "max_sequence_length": 2048,
        "pad_token_id": 0,
        "use_cache": False,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.1,
        "pretraining_tp": 2,
        "partial_rotary_factor": 1.0,
        "layer_types": ["full_attention", "full_attention"],
        "no_rope_layers": [1, 1],
        "query_pre_attn_scalar": 16,
        "attention_multiplier": 0.25,
        "logits_scaling": 1.0,
        "embedding_multiplier": 1,
        "num_experts": 0,
        "pruned_heads": {},
        "quantization_config": None,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "something_new": None,
        "something_else": False,
    }
    assert LlamaConfig.from_hf(write(tmp_path, **neutral)) == SMALL
    assert not caplog.records


def test_unknown_fields_are_named_in_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert LlamaConfig.from_hf(write(tmp_path, something_new=0.5)) == SMALL
    assert [r.getMessage() for r in caplog.records] == [
        "ignoring something_new=0.5 of the checkpoint's config: an unknown field."
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2' must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a whole number of at least 1"),
        ({"intermediate_size": 96.0}, "intermediate_size=96.0 must be a whole number"),
        ({"num_key_value_heads": 3}, "n_heads=4 must be a multiple of n_kv_heads=3"),
        ({"num_key_value_heads": True}, "num_key_value_heads=True must be"),
        ({"hidden_size": 66}, "hidden_size=66 is not a multiple of num_attention_heads=4"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"head_dim": -16}, "head_dim=-16 must be"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' must be a finite number greater than 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0 must be"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 must be"),
        ({"rope_theta": math.nan}, "rope_theta=nan must be"),
        ({"rope_theta": math.inf}, "rope_theta=inf must be"),
        ({"max_position_embeddings": -1}, "max_position_embeddings=-1 must be"),
        ({"tie_word_embeddings": "yes"}, "tie_embeddings='yes' must be True or False"),
        ({"bos_token_id": 128}, r"bos_id: 128 is not a token id in 0\.\.127"),
        ({"bos_token_id": "1"}, "bos_id: '1' is not a token id"),
        ({"eos_token_id": [2, -1]}, "eos_ids: -1 is not a token id"),
        ({"eos_token_id": [2, None]}, "eos_ids: None is not a token id"),
        ({"model_type": ..., "architectures": ...}, "model_type is missing"),
    ],
    ids=str,
)
def test_invalid_values(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        LlamaConfig.from_hf(write(tmp_path, **changes))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=rf"{tmp_path} holds no config\.json"):
        LlamaConfig.from_hf(tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere does not exist"):
        LlamaConfig.from_hf(tmp_path / "nowhere")
    file = tmp_path / "config.json"
    file.write_text('{"hidden_size": ')
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        LlamaConfig.from_hf(tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        LlamaConfig.from_hf(tmp_path)
    file.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        LlamaConfig.from_hf(tmp_path)
    file.write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"config\.json must hold a JSON object .* a list"):
        LlamaConfig.from_hf(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: Is a directory"):
        LlamaConfig.from_hf(tmp_path)


# ---- generation_config.json


@pytest.mark.parametrize(
    ("generation", "expected"),
    [([3, 4], (3, 4)), (5, (5,)), (None, (2,)), (..., (2,)), ([], (2,))],
    ids=str,
)
def test_eos_ids_of_the_generation_config_win(tmp_path, generation, expected):
    write(tmp_path)
    write(tmp_path, {"bos_token_id": 9}, name="generation_config.json", eos_token_id=generation)
    config = LlamaConfig.from_hf(tmp_path)
    assert (config.eos_ids, config.bos_id) == (expected, 1)
    assert LlamaConfig.from_hf(tmp_path / "config.json") == config


def test_a_bad_generation_config_is_named(tmp_path):
    write(tmp_path)
    write(tmp_path, {"eos_token_id": 999}, name="generation_config.json")
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_ids: 999 is not a token id"):
        LlamaConfig.from_hf(tmp_path)
    write(tmp_path, [], name="generation_config.json")
    with pytest.raises(ConfigError, match=r"generation_config\.json must hold a JSON object"):
        LlamaConfig.from_hf(tmp_path)


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"do_sample": False, "temperature": 0.5},
        {"temperature": 0.6, "top_p": 0.9},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        {"do_sample": True, "top_k": 0, "min_p": 0.05},
        {"do_sample": True, "top_k": None, "temperature": None},
        {"do_sample": True, "repetition_penalty": 1.1},
        {"do_sample": True, "repetition_penalty": 1},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_sampling_defaults_are_those_of_transformers(tmp_path, raw):
    write(tmp_path, raw, name="generation_config.json")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    theirs.update(**theirs._get_default_generation_params(), defaults_only=True)  # as `generate` does
    ours = read_generation_config(tmp_path)
    assert ours.pop("repetition_penalty", 1.0) == theirs.repetition_penalty
    assert ours["do_sample"] == theirs.do_sample
    if ours["do_sample"]:
        expected = {name: getattr(theirs, name) for name in ("do_sample", "temperature", "top_k", "top_p", "min_p")}
        assert ours == expected | {"min_p": theirs.min_p or 0.0}
    else:
        assert ours == {"do_sample": False}


def test_no_generation_config_is_greedy(tmp_path):
    assert read_generation_config(tmp_path) == {"do_sample": False}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"temperature": 0}, "temperature=0 must be"),
        ({"temperature": "hot"}, "temperature='hot' must be"),
        ({"top_k": -1}, "top_k=-1 must be"),
        ({"top_k": 1.5}, "top_k=1.5 must be"),
        ({"top_p": 1.5}, "top_p=1.5 must be a number from 0 to 1"),
        ({"top_p": math.nan}, "top_p=nan must be"),
        ({"min_p": True}, "min_p=True must be"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be"),
        ({"repetition_penalty": "high"}, "repetition_penalty='high' must be"),
    ],
    ids=str,
)
def test_invalid_sampling_defaults(tmp_path, raw, message):
    write(tmp_path, {"do_sample": True} | raw, name="generation_config.json")
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {message}"):
        read_generation_config(tmp_path)


def test_unsupported_sampling_defaults_are_named_in_a_warning(tmp_path, caplog):
    raw = {
        "repetition_penalty": 1.1,
        "penalty_alpha": 0.6,
        "num_beams": 1,
        "no_repeat_ngram_size": 3,
        "max_length": 4096,
        "typical_p": 1.0,
    }
    write(tmp_path, raw, name="generation_config.json")
    read_generation_config(tmp_path)
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2
    assert "no_repeat_ngram_size=3 is not supported" in messages[0]
    assert "penalty_alpha=0.6 is not supported" in messages[1]


# ---- LlamaConfig itself


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": -1}, "dim=-1 must be a whole number of at least 1"),
        ({"dim": "64"}, "dim='64' must be"),
        ({"n_layers": True}, "n_layers=True must be"),
        ({"norm_eps": math.nan}, "norm_eps=nan must be a finite number"),
        ({"norm_eps": "1e-5"}, "norm_eps='1e-5' must be"),
        ({"rope_theta": 0}, "rope_theta=0 must be"),
        ({"rope_scaling": {"factor": 8.0}}, "must be a RopeScaling or None"),
        ({"eos_ids": [2]}, r"eos_ids=\[2\] must be a tuple"),
        ({"eos_ids": 2}, "eos_ids=2 must be a tuple"),
        ({"eos_ids": (128,)}, "eos_ids: 128 is not a token id"),
        ({"bos_id": 1.0}, "bos_id: 1.0 is not a token id"),
        ({"tie_embeddings": 1}, "tie_embeddings=1 must be True or False"),
        ({"dtype": "int8"}, "dtype='int8' is not one of float32"),
    ],
    ids=str,
)
def test_config_checks_its_fields(changes, message):
    with pytest.raises(ConfigError, match=message):
        SMALL.replace(**changes)


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"])
@pytest.mark.parametrize("value", [0, -1.0, "8", None, math.nan, True])
def test_rope_scaling_checks_its_fields(name, value):
    good = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 128}
    with pytest.raises(ConfigError, match=rf"rope_scaling\.{name}="):
        RopeScaling(**good | {name: value})


def test_from_dict():
    values = {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 16,
        "ffn_dim": 96,
        "vocab_size": 128,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_seq_len": 256,
        "bos_id": 1,
        "eos_ids": [2],
    }
    assert LlamaConfig.from_dict(values) == SMALL
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 128}
    config = LlamaConfig.from_dict(values | {"rope_scaling": scaling})
    assert config.rope_scaling == LLAMA3_SCALING
    assert hash(config) == hash(SMALL.replace(rope_scaling=LLAMA3_SCALING))
    with pytest.raises(ConfigError, match="has no field 'n_kv_head'; did you mean n_kv_heads"):
        LlamaConfig.from_dict(values | {"n_kv_head": 2})
    with pytest.raises(ConfigError, match="has no field 'xyzzy'; its fields are dim, n_layers"):
        LlamaConfig.from_dict(values | {"xyzzy": 2})
    with pytest.raises(ConfigError, match="rope_scaling has no field 'factr'; did you mean factor"):
        LlamaConfig.from_dict(values | {"rope_scaling": scaling | {"factr": 2}})
    with pytest.raises(ConfigError, match="the model config lacks dim, head_dim"):
        LlamaConfig.from_dict({k: v for k, v in values.items() if k not in ("dim", "head_dim")})


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 32},
        {"n_layers": 3},
        {"n_heads": 8},
        {"n_kv_heads": 4},
        {"head_dim": 32},
        {"ffn_dim": 97},
        {"vocab_size": 129},
        {"norm_eps": 1e-6},
        {"rope_theta": 5e5},
        {"rope_scaling": LLAMA3_SCALING},
        {"tie_embeddings": True},
        {"bos_id": None},
        {"eos_ids": (3,)},
    ],
    ids=str,
)
def test_check_matches_names_the_field_and_both_values(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ConfigError) as error:
        check_matches(SMALL.replace(**changes), SMALL)
    assert f"{name}: the config says {value!r}, the checkpoint {getattr(SMALL, name)!r}" in str(error.value)


def test_check_matches():
    check_matches(SMALL, SMALL)
    with pytest.raises(ConfigError, match=r"max_seq_len: .*; dtype: .*--dtype chooses another"):
        check_matches(SMALL.replace(dtype="float16", max_seq_len=100), SMALL)
    # A base and an Instruct checkpoint of one model.
    instruct = SMALL.replace(eos_ids=(2, 3, 4))
    check_matches(SMALL, instruct)
    check_matches(instruct, SMALL)
    with pytest.raises(ConfigError, match=r"dim: .*; n_layers: "):
        check_matches(SMALL.replace(dim=32, n_layers=3), SMALL)
