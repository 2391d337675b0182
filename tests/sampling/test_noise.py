"""The noise of sampling: Gumbel's distribution, and a function of seed, position, token and draw alone."""

import jax
import numpy as np
import pytest
from scipy import stats

from sharded_llama.sampling.entropy_settings import MAX_CANDIDATES
from sharded_llama.sampling.noise import gumbel

noise = jax.jit(gumbel, static_argnames="draw")


def seeds(*values):
    return np.array([(s >> 32, s & 0xFFFFFFFF) for s in values], np.uint32)


def of(seed=7, position=0, n_ids=4000, draw=0):
    """The noise of ids 0..n-1."""
    ids = np.arange(n_ids, dtype=np.int32)[None]
    return np.asarray(noise(seeds(seed), np.array([position], np.int32), ids, draw=draw))[0]


def correlation(a, b):
    return abs(np.corrcoef(a, b)[0, 1])


@pytest.mark.parametrize("draw", [0, 1, MAX_CANDIDATES - 1])
def test_gumbel(draw):
    """Over ids, over positions and over seeds. A p-value below 1e-6 is not chance."""
    n = 20_000
    one_id = np.full((n, 1), 5, np.int32)
    every = np.arange(n, dtype=np.int32)
    same_seed, same_position = np.repeat(seeds(3), n, 0), np.full(n, 9, np.int32)
    samples = [
        of(n_ids=n, draw=draw),
        np.asarray(noise(same_seed, every, one_id, draw=draw))[:, 0],
        np.asarray(noise(seeds(*range(n)), same_position, one_id, draw=draw))[:, 0],
    ]
    for sample in samples:
        assert sample.dtype == np.float32
        assert stats.kstest(sample, stats.gumbel_r.cdf).pvalue > 1e-6
        assert np.unique(sample).size > 0.99 * n


def test_the_largest_noise_decides_and_is_as_rare_as_it_should_be():
    """The tail: of a million, e**-g are above g; four standard deviations allowed."""
    large = np.concatenate([of(position=p, n_ids=2**17) for p in range(8)])
    assert np.isfinite(large).all()
    for g in (6.0, 8.0, 10.0):
        expected = large.size * -np.expm1(-np.exp(-g))
        assert abs((large > g).sum() - expected) < 4 * np.sqrt(expected)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 8},
        {"seed": 7 + 2**32},
        {"seed": 7 + 2**63},
        {"seed": 7 * 2**32},
        {"position": 1},
        {"position": 2**31 - 1},
        *({"draw": i} for i in (1, 2, MAX_CANDIDATES - 1)),
    ],
    ids=str,
)
def test_what_it_depends_on(other):
    """Both halves of the seed, position and draw; with any of them changed nothing is left of it."""
    a, b = of(), of(**other)
    assert (a == b).sum() <= 2
    assert correlation(a, b) < 5 / np.sqrt(a.size)


def test_it_depends_on_nothing_else():
    """Not on the row, nor on which other ids are asked for, nor in what order."""
    rng = np.random.default_rng(0)
    all_ids, some = of(n_ids=300), rng.permutation(300)[:40].astype(np.int32)
    rows = np.stack([rng.permutation(40).astype(np.int32), some, some[::-1]])
    found = np.asarray(noise(seeds(1, 7, 7), np.array([5, 0, 0], np.int32), rows))
    np.testing.assert_array_equal(found[1], all_ids[some])
    np.testing.assert_array_equal(found[2], all_ids[some[::-1]])


def test_neighbouring_positions_seeds_and_draws_are_not_shifted_copies():
    """No id's noise is another id's at the next position, seed or draw."""
    a = of()
    for other in ({"position": 1}, {"seed": 8}, {"draw": 1}):
        assert np.intersect1d(a, of(**other)).size < 20, "among 4000 numbers of 2**32 hardly any are equal by chance"


def test_draws_differ_among_one_another():
    several = [of(draw=i) for i in (0, 1, 2, MAX_CANDIDATES - 1)]
    for i, one in enumerate(several):
        assert all(correlation(one, other) < 5 / np.sqrt(one.size) for other in several[:i])
