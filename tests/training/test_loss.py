"""Cross-entropy and scores: against torch, with masks and padding, and in units that can be worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_reference import make_model, save
from tiny_model import CONFIG, random_weights

from sharded_llama.checkpoint import load_weights, open_checkpoint
from sharded_llama.config import LlamaConfig
from sharded_llama.mesh import make_mesh
from sharded_llama.training.data import TokenizedText
from sharded_llama.training.evaluation import Score, score_text
from sharded_llama.training.loss import mean_over, token_nll

RNG = np.random.default_rng(0)
LOGITS = (5 * RNG.standard_normal((2, 3, 7))).astype(np.float32)
TARGETS = np.array([[0, 6, 3], [2, 2, 5]], np.int32)


def test_token_nll_is_cross_entropy():
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(LOGITS).reshape(-1, 7), torch.from_numpy(TARGETS).long().reshape(-1), reduction="none"
    )
    np.testing.assert_allclose(token_nll(LOGITS, TARGETS).reshape(-1), expected, rtol=1e-6)


def test_padding_of_the_vocabulary_changes_nothing():
    padded = np.pad(LOGITS, [(0, 0), (0, 0), (0, 3)], constant_values=-np.inf)
    np.testing.assert_array_equal(token_nll(padded, TARGETS), token_nll(LOGITS, TARGETS))
    gradient = jax.grad(lambda x: token_nll(x, TARGETS).sum())(jnp.asarray(padded))
    assert np.isfinite(gradient).all()
    assert not gradient[..., 7:].any()


def test_large_logits_do_not_overflow():
    logits = np.array([[[1e4, 0.0, -1e4]]], np.float32)
    assert token_nll(logits, np.array([[0]])) == 0
    assert token_nll(logits, np.array([[2]])) == 2e4


@pytest.mark.parametrize("valid", [[[1, 1, 1], [1, 1, 1]], [[1, 0, 0], [0, 1, 1]], [[0, 0, 0], [0, 0, 1]]])
def test_mean_counts_valid_tokens_only(valid):
    valid = np.array(valid, bool)
    nll = RNG.standard_normal((2, 3)).astype(np.float32)
    ignored = np.where(valid, nll, np.nan)
    assert float(mean_over(valid, ignored)) == pytest.approx(nll[valid].mean(), rel=1e-6)


def test_mean_over_nothing_is_zero():
    assert mean_over(np.zeros((2, 3), bool), np.ones((2, 3), np.float32)) == 0


def test_score_units():
    score = Score(nats=8 * math.log(2), n_tokens=4, n_bytes=16)
    assert score.loss == pytest.approx(2 * math.log(2))
    assert score.perplexity == pytest.approx(4)
    assert score.bits_per_byte == pytest.approx(0.5)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 2), (1, 8)], ids=str)
def test_a_model_that_knows_nothing_needs_log2_v_bits_per_token(mesh_shape):
    """Also where kv heads are repeated, V is padded, and the last window and batch are partial."""
    mesh, config = make_mesh(*mesh_shape), CONFIG.replace(vocab_size=261)
    weights = random_weights(config, mesh_shape)
    weights = weights._replace(norm=jnp.zeros_like(weights.norm))  # all logits 0
    text = TokenizedText(np.arange(75, dtype=np.int32), n_bytes=200)
    score = score_text(weights, config, text, mesh=mesh, batch=4, length=8, bos_id=0)
    assert (score.n_tokens, score.n_bytes) == (75, 200)
    assert score.loss == pytest.approx(math.log(261), rel=1e-6)
    assert score.bits_per_byte == pytest.approx(75 * math.log2(261) / 200, rel=1e-6)


def test_score_is_the_references(tmp_path):
    """Windows of 5 from BOS, each token once."""
    model = make_model("grouped")
    config = LlamaConfig.from_hf(save(model, tmp_path))
    ids = RNG.integers(2, config.vocab_size, 23)
    nats = 0.0
    for start in range(0, len(ids), 5):
        window = torch.from_numpy(ids[start : start + 5])
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor([1]), window[:-1]])[None]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, window, reduction="sum").item()
    mesh = make_mesh(2, 4)
    weights = load_weights(open_checkpoint(tmp_path), config, mesh=mesh, progress=False)
    text = TokenizedText(ids.astype(np.int32), n_bytes=50)
    assert score_text(weights, config, text, mesh=mesh, batch=2, length=5, bos_id=1).nats == pytest.approx(nats, 1e-6)
