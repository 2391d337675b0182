"""Meta and Hugging Face forms of the same random weights: logits within the numerics contract of transformers."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hf_models import state_of
from hf_reference import LLAMA3_ROPE, distance, logits, make_model, rounded, save
from meta_models import save_meta

import sharded_llama as sl
from sharded_llama.config import LlamaConfig

# Shapes that Meta's layout can say: the head width is dim / n_heads.
SHAPES = {"num_key_value_heads": 4, "head_dim": 8, "hidden_size": 64, "vocab_size": 104, "intermediate_size": 96}
TOKENS = np.random.default_rng(1).integers(0, 104, (3, 29))


@pytest.mark.parametrize(("files", "mesh"), [(1, (1, 1)), (2, (2, 4)), (4, (1, 8))], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_logits(tmp_path: Path, dtype: str, files: int, mesh: tuple[int, int]):
    stored = "bfloat16" if dtype == "bfloat16" else "float32"
    rope = LLAMA3_ROPE | {"factor": 16.0, "original_max_position_embeddings": 8192}
    model = make_model("grouped_llama3", **SHAPES, rope_parameters=rope)
    hf = LlamaConfig.from_hf(save(model, tmp_path / "hf", stored))
    params = {"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 96, "ffn_dim_multiplier": 0.5}
    params |= {"norm_eps": 1e-5, "rope_theta": 500_000.0, "use_scaled_rope": True, "vocab_size": 104}
    save_meta(tmp_path / "meta", state_of(model), hf, files=files, params=params)
    (tmp_path / "meta" / "sharded_llama.json").write_text(json.dumps({"max_seq_len": 64}))
    with jax.enable_x64(dtype == "float64"):
        ours = [
            sl.LLM(folder, mesh=sl.make_mesh(*mesh), dtype=dtype, rope_factor=factor, skip_tokenizer=True)
            for folder, factor in ((tmp_path / "hf", None), (tmp_path / "meta", 16.0))
        ]
        assert ours[1].config == ours[0].config.replace(bos_id=1, eos_ids=(2,))
        from_hf, from_meta = (np.asarray(llm.forward(TOKENS), np.float64) for llm in ours)
    np.testing.assert_array_equal(from_meta, from_hf)
    exact = logits(rounded(model, stored), TOKENS, "float32" if dtype == "bfloat16" else "float64")
    theirs = logits(rounded(model, stored), TOKENS, dtype)
    if dtype == "float64":
        assert distance(from_meta, exact) < 1e-10
    elif dtype == "float32":
        assert distance(from_meta, theirs) < max(1e-5, 1.5 * distance(theirs, exact))
        np.testing.assert_allclose(from_meta, theirs, rtol=1e-3, atol=1e-2)
    else:
        assert distance(from_meta, exact) < 1.25 * distance(theirs, exact)
