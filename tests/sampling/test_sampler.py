"""The sampler against a NumPy specification, and its noise against what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from sharded_llama.mesh import make_mesh
from sharded_llama.sampling import MAX_LOGPROBS, SamplingParams, log_normalizer, pack_rows, sample
from sharded_llama.sampling.sampler import sample_rows
from sharded_llama.sharding import padded

VOCAB = 37
draw = jax.jit(sample_rows)


def allowed_tokens(logits, p):
    """The specification: temperature, then min_p, top_k, top_p, each on the renormalised result of the one before."""
    x = np.float64(logits) / p.temperature
    probs = np.exp(x - x.max())
    probs /= probs.sum()
    order = np.lexsort((np.arange(VOCAB), -probs))
    probs = probs[order]
    probs[probs < p.min_p * probs[0]] = 0
    probs /= probs.sum()
    if p.top_k:
        probs[p.top_k :] = 0
        probs /= probs.sum()
    if p.top_p < 1:
        mass_before = np.cumsum(probs) - probs
        probs[mass_before >= p.top_p] = 0
        probs /= probs.sum()
    full = np.zeros(VOCAB)
    full[order] = probs
    return full


def sample_many(logits, params, n):
    """n draws with params at positions 0..n-1."""
    rows = pack_rows([params] * n)
    return np.asarray(draw(np.tile(logits, (n, 1)).astype(np.float32), rows, np.arange(n, dtype=np.int32)))


@pytest.mark.parametrize(
    "settings_",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.7, "min_p": 0.05, "top_k": 12, "top_p": 0.8},
    ],
    ids=str,
)
def test_distribution(settings_):
    """Chi-square of 20,000 draws against the specified distribution; the bound is exceeded once in 10^6 runs."""
    logits = 1.5 * np.random.default_rng(0).standard_normal(VOCAB)
    params = SamplingParams(seed=7, **settings_)
    expected = allowed_tokens(logits, params)
    counts = np.bincount(sample_many(logits, params, 20_000), minlength=VOCAB)
    assert not counts[expected == 0].any(), "a filtered token was drawn"
    live = expected * 20_000 > 5
    chi2 = np.sum((counts[live] - 20_000 * expected[live]) ** 2 / (20_000 * expected[live]))
    degrees = live.sum() - 1
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees) + 15


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.floats(0.1, 5),
    st.integers(0, 40),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_only_allowed_tokens_are_drawn(seed, temperature, top_k, top_p, min_p):
    logits = 2 * np.random.default_rng(seed).standard_normal(VOCAB)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    # A token at the very edge of top_p may fall on either side in float32: widen the specification by a hair.
    allowed = allowed_tokens(
        logits, SamplingParams(**{**vars(params), "top_p": min(1, top_p + 1e-5), "min_p": min_p * 0.9999})
    )
    assert np.all(allowed[sample_many(logits, params, 50)] > 0)


def test_filters_see_the_renormalised_result_of_the_one_before():
    """top_k keeps {0, 1}, of which 0 holds 0.55: top_p=0.5 keeps 0 alone. Of the raw one it would keep both."""
    probs = np.array([0.33, 0.27, 0.2, 0.2] + [0] * (VOCAB - 4))
    with np.errstate(divide="ignore"):
        tokens = sample_many(np.log(probs), SamplingParams(top_k=2, top_p=0.5, seed=0), 200)
    assert set(tokens) == {0}


def test_greedy_takes_the_first_of_equals():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [9, 20]] = 1
    assert draw(logits, pack_rows([SamplingParams(temperature=0, seed=0)]), np.zeros(1, np.int32))[0] == 9


def chosen(logits, rows, positions, mesh):
    return sample(logits, log_normalizer(logits, mesh=mesh), rows, positions, vocab_size=VOCAB, mesh=mesh)


def log_softmax(logits):
    exact = logits.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(-1, keepdims=True))


def check_logprobs(sampled, logits):
    """Log-probability of each row's token among the raw logits, and how many are more likely."""
    tokens = np.asarray(sampled.tokens_R)[:, None]
    of_token = np.take_along_axis(log_softmax(logits), tokens, axis=-1)
    np.testing.assert_allclose(sampled.logprobs_R, of_token[:, 0], rtol=1e-5, atol=1e-6)
    more_likely = (logits > np.take_along_axis(logits, tokens, axis=-1)).sum(-1)
    np.testing.assert_array_equal(sampled.ranks_R, 1 + more_likely)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4), (1, 8), (8, 1)], ids=str)
def test_mesh_slot_and_padding_do_not_matter(mesh_shape):
    """The same logits, seed and position give the same token on every mesh, in every slot, with any padding."""
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((8, VOCAB)).astype(np.float32)
    params = [SamplingParams(temperature=1.3, seed=s, top_p=0.95) for s in range(8)]
    positions = np.arange(8, dtype=np.int32) + 100
    expected = np.asarray(draw(logits, pack_rows(params), positions))
    mesh = make_mesh(*mesh_shape)
    width = padded(VOCAB, mesh_shape[1]) - VOCAB
    wide = np.pad(logits, [(0, 0), (0, width)], constant_values=-np.inf)
    order = rng.permutation(8)
    run = jax.jit(lambda x, rows, p: chosen(x, rows, p, mesh))
    sampled = run(wide[order], pack_rows([params[i] for i in order]), positions[order])
    np.testing.assert_array_equal(sampled.tokens_R, expected[order])
    check_logprobs(sampled, logits[order])
    top = np.argsort(-logits[order], axis=-1, kind="stable")[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(sampled.top_tokens_RJ, top)
    exact = np.take_along_axis(log_softmax(logits[order]), top, axis=-1)
    np.testing.assert_allclose(sampled.top_logprobs_RJ, exact, rtol=1e-5, atol=1e-6)
    assert all(x.sharding.is_fully_replicated for x in sampled)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4), (1, 8)], ids=str)
def test_sharded_greedy(mesh_shape):
    mesh = make_mesh(*mesh_shape)
    logits = np.random.default_rng(2).integers(0, 4, (8, padded(VOCAB, mesh_shape[1]))).astype(np.float32)  # many ties
    logits[:, VOCAB:] = -np.inf
    sampled = jax.jit(lambda x: chosen(x, None, jnp.zeros(8, jnp.int32), mesh))(logits)
    np.testing.assert_array_equal(sampled.tokens_R, logits.argmax(-1))
    check_logprobs(sampled, logits[:, :VOCAB])
    assert sampled.top_tokens_RJ is None


def test_noise_depends_on_seed_and_position():
    logits = np.zeros(VOCAB)
    one, two = (sample_many(logits, SamplingParams(seed=s), 64) for s in (1, 2))
    assert (one == two).mean() < 0.3
    assert len(set(one)) > 10
    high = SamplingParams(seed=1 + 2**40)
    assert (sample_many(logits, high, 64) == one).mean() < 0.3, "the upper half of the seed counts"
