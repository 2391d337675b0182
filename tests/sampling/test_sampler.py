"""The sampler as steps call it: its draws against a NumPy specification, wherever a row stands."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from sampling import entropy_spec, sampler_spec as spec

from sharded_llama.mesh import make_mesh
from sharded_llama.sampling import MAX_LOGPROBS, Mode, SamplingParams, log_normalizer, mode_of, pack_rows, sample
from sharded_llama.sampling.entropy import Strategy, token_metrics
from sharded_llama.sampling.entropy_settings import MAX_CANDIDATES, EntropySettings
from sharded_llama.sampling.noise import gumbel
from sharded_llama.sampling.structured import StructuredOutputs
from sharded_llama.sharding import padded

VOCAB = 150  # more than there are candidates, and nothing that divides by a mesh
MESHES = [(1, 1), (2, 4), (1, 8), (8, 1), (4, 2)]


class Row(NamedTuple):
    """What one row is sampled from."""

    logits: np.ndarray
    params: SamplingParams
    position: int = 0
    prompt: tuple = ()
    generated: tuple = ()
    allowed: Any = None
    forced: int = -1
    attention: tuple = (0.0, 0.0, 0.0, 0.0)
    last: int = 0

    @property
    def setting(self):
        return {name: getattr(self, name) for name in ("params", "prompt", "generated", "allowed")}

    @property
    def processed(self):
        return spec.processed(np.float32(self.logits), **self.setting)

    def noise(self, draw=0):
        """Of every token, of one of MAX_CANDIDATES draws."""
        return np.asarray(_noises(pack_rows([self.params]).seed_R2, np.array([self.position], np.int32))[draw][0])

    @property
    def expected(self):
        """The specification's token."""
        return self.forced if self.forced >= 0 else spec.drawn(self.processed, self.params, self.noise())


@jax.jit
def _noises(seed_R2, position_R):
    ids = np.arange(VOCAB, dtype=np.int32)[None]
    return [gumbel(seed_R2, position_R, ids, draw=i) for i in range(MAX_CANDIDATES)]


@functools.cache
def sampler(mesh_shape, mode):
    mesh = make_mesh(*mesh_shape)

    def run(logits, *args):
        return sample(logits, log_normalizer(logits, mesh=mesh), *args, mode=mode, vocab_size=VOCAB, mesh=mesh)

    return jax.jit(run)


def run(rows, mesh_shape=(1, 1), mode=Mode.SAMPLE, seed=0):
    """What is sampled for the rows, in their order: they are spread over the mesh and its slots by chance."""
    rng = np.random.default_rng(seed)
    data, n = mesh_shape[0], len(rows)
    of_shard = n // data
    order = rng.permutation(n)
    slot_R = np.concatenate([rng.permutation(of_shard) for _ in range(data)]).astype(np.int32)
    placed = [rows[i] for i in order]
    settings = [None] * n
    for at, row in enumerate(placed):
        settings[at // of_shard * of_shard + slot_R[at]] = row.setting
    width = padded(VOCAB, mesh_shape[1])
    logits = np.stack([np.float32(row.logits) for row in placed])
    with_metrics = mode == Mode.ENTROPY
    found = sampler(mesh_shape, mode)(
        np.pad(logits, ((0, 0), (0, width - VOCAB)), constant_values=-np.inf),
        np.array([row.attention for row in placed], np.float32) if with_metrics else None,
        np.array([row.last for row in placed], np.int32) if with_metrics else None,
        pack_rows([row.params for row in placed]),
        None if mode == Mode.GREEDY else spec.slot_arrays(settings, VOCAB, width),
        slot_R,
        np.array([row.position for row in placed], np.int32),
        np.array([row.forced for row in placed], np.int32),
    )
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(found))
    back = np.argsort(order)
    return type(found)(*(None if x is None else np.asarray(x)[back] for x in found))


def check_logprobs(sampled, rows):
    """Of the raw logits, whatever was drawn from: the token's log-probability, and how many are more likely."""
    logits = np.stack([np.float32(row.logits) for row in rows])
    tokens = sampled.tokens_R[:, None]
    of_token = np.take_along_axis(spec.log_softmax(logits), tokens, axis=-1)
    np.testing.assert_allclose(sampled.logprobs_R, of_token[:, 0], rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(sampled.ranks_R, 1 + (logits > np.take_along_axis(logits, tokens, axis=-1)).sum(-1))


def mixed_rows(n=32):
    """Plain, filtered, penalised, biased, masked, greedy and forced rows, with ties here and there."""
    rng = np.random.default_rng(1)
    asked = (
        {},
        {"temperature": 1.3, "top_p": 0.9},
        {"top_k": 7, "min_p": 0.01},
        {"temperature": 4.0, "top_k": 140, "top_p": 0.95},  # beyond the candidates
        {"temperature": 2.0, "top_p": 0.999},
        {"temperature": 0.0},
        {"temperature": 1.5, "presence_penalty": 1.5, "frequency_penalty": -2.0, "repetition_penalty": 1.7},
        {"logit_bias": {3: 9.0, VOCAB - 1: 9.5, 77: -100.0}, "temperature": 1.2},
        {"temperature": 0.0, "frequency_penalty": 2.0, "logit_bias": {9: 12.0}},
    )
    rows = []
    for i in range(n):
        logits = 2 * rng.standard_normal(VOCAB)
        rows.append(
            Row(
                np.round(logits) if i % 5 == 4 else logits,
                SamplingParams(seed=1000 * i + 2**40, **asked[i % len(asked)]),
                position=100 + i,
                prompt=tuple(rng.integers(0, VOCAB, 20).tolist()),
                generated=tuple(rng.integers(0, VOCAB // 2, 30).tolist()),
                allowed=np.flatnonzero(rng.random(VOCAB) < 0.4).tolist() if i % 4 == 3 else None,
                forced=i if i % 16 == 9 else -1,
            )
        )
    return rows


N_DRAWS = 20_000
FILTERS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_k beyond the candidates": {"top_k": 140, "temperature": 3.0},
    "top_p": {"top_p": 0.7},
    "top_p beyond the candidates": {"top_p": 0.97, "temperature": 5.0},
    "min_p": {"min_p": 0.2},
    "all filters": {"temperature": 1.7, "min_p": 0.05, "top_k": 12, "top_p": 0.8},
}
CHANGES = {
    "presence_penalty": 0.7,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.4,
    "logit_bias": {3: 2.5, 149: -3},
}


@functools.cache
def draws():
    """A jitted sampler of N_DRAWS positions of one row."""
    mesh = make_mesh(1, 1)

    def many(logits_V, rows, slots):
        everywhere = jax.tree.map(lambda x: jax.numpy.repeat(x, N_DRAWS, axis=0), (logits_V[None], rows))
        logits, rows = everywhere
        none = np.zeros(N_DRAWS, np.int32)
        normalizer = log_normalizer(logits, mesh=mesh)
        positions = np.arange(N_DRAWS, dtype=np.int32)
        args = (logits, normalizer, None, None, rows, slots, none, positions, none - 1)
        return sample(*args, mode=Mode.SAMPLE, vocab_size=VOCAB, mesh=mesh).tokens_R

    return jax.jit(many)


@pytest.mark.parametrize("changes", [{}, CHANGES], ids=["raw", "changed"])
@pytest.mark.parametrize("asked", FILTERS)
def test_distribution(asked, changes):
    """Chi-square of 20,000 draws against the specified distribution; the bound is exceeded once in 10^6 runs."""
    rng = np.random.default_rng(0)
    params = SamplingParams(seed=7, **FILTERS[asked], **changes)
    row = Row(1.5 * rng.standard_normal(VOCAB), params)
    if changes:
        row = row._replace(
            prompt=tuple(range(10)),
            generated=(*range(5, 30), 7, 7),
            allowed=np.flatnonzero(rng.random(VOCAB) < 0.6).tolist(),
        )
    expected = spec.distribution(row.processed, params)
    slots = spec.slot_arrays([row.setting], VOCAB, VOCAB)
    tokens = np.asarray(draws()(np.float32(row.logits), pack_rows([params]), slots))
    counts = np.bincount(tokens, minlength=VOCAB)
    assert not counts[expected == 0].any(), "a filtered token was drawn"
    live = expected * N_DRAWS > 5
    chi2 = np.sum((counts[live] - N_DRAWS * expected[live]) ** 2 / (N_DRAWS * expected[live]))
    degrees = live.sum() - 1
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees) + 15


@pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
def test_a_row_gives_the_same_wherever_it_stands(mesh_shape):
    """On every mesh, in any slot and order: the specification's token, which the noise of its seed decides."""
    rows = mixed_rows()
    changes = [row.processed[row.expected] - row.logits[row.expected] for row in rows]
    assert np.sum(np.abs(changes) > 0.1) >= 4, "tokens are drawn whose logits were changed"
    for seed in range(2):
        sampled = run(rows, mesh_shape, seed=seed)
        np.testing.assert_array_equal(sampled.tokens_R, [row.expected for row in rows])
        check_logprobs(sampled, rows)
        assert sampled.top_tokens_RJ is None


def test_random_filters_draw_what_the_specification_draws():
    rng = np.random.default_rng(3)
    drawn, expected = [], []
    for _ in range(8):
        rows = [
            Row(
                rng.choice([0.3, 2, 10]) * rng.standard_normal(VOCAB),
                SamplingParams(
                    temperature=float(rng.uniform(0.1, 5)),
                    top_k=int(rng.integers(0, VOCAB + 20)),
                    top_p=float(rng.choice([1, rng.uniform(0.01, 1)])),
                    min_p=float(rng.choice([0, rng.uniform(0, 0.5)])),
                    seed=int(rng.integers(0, 2**63)),
                ),
                position=int(rng.integers(0, 2**31)),
            )
            for _ in range(32)
        ]
        drawn += run(rows).tokens_R.tolist()
        expected += [row.expected for row in rows]
    # A token at the very edge of top_p may fall on either side in float32.
    assert np.mean(np.array(drawn) == expected) >= 0.99


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)], ids=str)
def test_most_likely_tokens_are_those_of_the_raw_logits(mesh_shape):
    """Penalties, filters and masks do not show in them, and they do not change what is drawn."""
    rows = mixed_rows()
    sampled = run(rows, mesh_shape, Mode.LOGPROBS)
    np.testing.assert_array_equal(sampled.tokens_R, [row.expected for row in rows])
    check_logprobs(sampled, rows)
    logits = np.stack([np.float32(row.logits) for row in rows])
    top = np.argsort(-logits, axis=-1, kind="stable")[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(sampled.top_tokens_RJ, top)
    exact = np.take_along_axis(spec.log_softmax(logits), top, axis=-1)
    np.testing.assert_allclose(sampled.top_logprobs_RJ, exact, rtol=1e-5, atol=2e-6)


def test_forced_tokens_have_their_own_log_probabilities():
    """In every mode; the draw of other rows stays as it is. Token 0 can be forced too, and one that is not allowed."""
    rows = [r._replace(forced=-1) for r in mixed_rows()]
    free = run(rows).tokens_R
    forced = [row._replace(forced=i % 5 * 37, allowed=[149]) if i % 2 else row for i, row in enumerate(rows)]
    for mode in (Mode.GREEDY, Mode.SAMPLE, Mode.LOGPROBS):
        sampled = run(forced, mode=mode)
        assert sampled.tokens_R[1::2].tolist() == [row.forced for row in forced[1::2]]
        check_logprobs(sampled, forced)
        if mode != Mode.GREEDY:
            np.testing.assert_array_equal(sampled.tokens_R[::2], free[::2])


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4), (1, 8)], ids=str)
def test_greedy_rows_are_the_same_in_both_modes(mesh_shape):
    """The first of equals, with any filter set, among rows that sample; other modes' slots are not needed."""
    rng = np.random.default_rng(2)
    params = [SamplingParams(temperature=0.0, seed=i, top_k=i % 3, top_p=0.5, min_p=0.9) for i in range(32)]
    rows = [Row(rng.integers(0, 4, VOCAB), p) for p in params]  # many ties
    expected = [int(np.argmax(row.logits)) for row in rows]
    sampled = run(rows, mesh_shape, Mode.GREEDY)
    np.testing.assert_array_equal(sampled.tokens_R, expected)
    check_logprobs(sampled, rows)
    assert sampled.top_tokens_RJ is None
    warm = SamplingParams(temperature=2.0, seed=5)
    mixed = [row._replace(params=warm) if i % 2 else row for i, row in enumerate(rows)]
    np.testing.assert_array_equal(run(mixed, mesh_shape).tokens_R[::2], expected[::2])


def test_temperatures_close_to_0_are_nearly_greedy():
    """Nothing overflows: only tokens with the largest logit are drawn."""
    rng = np.random.default_rng(4)
    rows = []
    for i in range(32):
        logits = 1e4 * rng.standard_normal(VOCAB)
        logits[[3, 140]] = logits.max() + (1 if i % 2 else 0)
        rows.append(Row(logits, SamplingParams(temperature=(1e-3, 1e-20, 1e-44)[i % 3], seed=i, top_p=0.99)))
    tokens = run(rows).tokens_R
    assert all(
        np.float32(row.logits)[token] == np.float32(row.logits).max() for row, token in zip(rows, tokens, strict=True)
    )
    assert {3, 140} <= set(tokens.tolist()), "which of equals is still drawn"


def test_a_mask_of_one_token_leaves_that_one():
    """Whatever else is set."""
    rows = [row._replace(allowed=[(i * 41) % VOCAB], forced=-1) for i, row in enumerate(mixed_rows())]
    assert run(rows).tokens_R.tolist() == [(i * 41) % VOCAB for i in range(len(rows))]


@pytest.mark.parametrize("mode", [Mode.GREEDY, Mode.SAMPLE, Mode.LOGPROBS, Mode.ENTROPY])
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "infinite"])
def test_a_row_that_is_not_a_number_leaves_the_others_alone(mode, bad):
    """Its log-probability says so."""
    rows = mixed_rows()
    clean = run(rows, mode=mode)
    spoilt = list(rows)
    for i in (0, 5, 7, 30):
        logits = np.array(rows[i].logits)
        logits[:: 1 + i] = bad
        spoilt[i] = rows[i]._replace(logits=logits)
    found = run(spoilt, mode=mode)
    is_spoilt = np.isin(np.arange(len(rows)), (0, 5, 7, 30))
    assert np.isnan(found.logprobs_R[is_spoilt]).all()
    assert ((found.tokens_R >= 0) & (found.tokens_R < VOCAB)).all()
    for ours, theirs in zip(found, clean, strict=True):
        if theirs is not None:
            np.testing.assert_array_equal(ours[~is_spoilt], theirs[~is_spoilt])


def test_seeds_and_positions_give_other_tokens():
    """Also where they differ in the upper half of the seed alone."""
    flat = np.zeros(VOCAB)
    streams = []
    for seed in (1, 2, 1 + 2**40, -1):
        streams.append(run([Row(flat, SamplingParams(seed=seed), position=i) for i in range(32)]).tokens_R)
    for i, one in enumerate(streams):
        assert len(set(one.tolist())) > 20
        assert all((one == other).sum() <= 3 for other in streams[:i])


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({"temperature": 0.0}, Mode.GREEDY),
        ({"temperature": 0.0, "top_k": 5, "top_p": 0.5, "logprobs": 0, "stop_token_ids": [3]}, Mode.GREEDY),
        ({}, Mode.SAMPLE),
        ({"temperature": 0.0, "presence_penalty": -0.1}, Mode.SAMPLE),
        ({"temperature": 0.0, "frequency_penalty": 0.1}, Mode.SAMPLE),
        ({"temperature": 0.0, "repetition_penalty": 0.9}, Mode.SAMPLE),
        ({"temperature": 0.0, "logit_bias": {1: 1.0}}, Mode.SAMPLE),
        ({"temperature": 0.0, "allowed_token_ids": [1]}, Mode.SAMPLE),
        ({"temperature": 0.0, "bad_words": ["a"]}, Mode.SAMPLE),
        ({"temperature": 0.0, "min_tokens": 1}, Mode.SAMPLE),
        ({"temperature": 0.0, "structured_outputs": StructuredOutputs(regex="a")}, Mode.SAMPLE),
        ({"temperature": 0.0, "logprobs": 1}, Mode.LOGPROBS),
        ({"prompt_logprobs": 1}, Mode.LOGPROBS),
        ({"temperature": 0.0, "entropy": EntropySettings(), "logprobs": 3}, Mode.ENTROPY),
    ],
    ids=str,
)
def test_a_request_asks_for_as_much_as_it_needs(given, mode):
    assert mode_of(SamplingParams(**given)) == mode


# The entropy sampler

PEAKED = np.concatenate([[np.log(0.7)], np.full(VOCAB - 1, np.log(0.3 / (VOCAB - 1)))])  # H = 3.0, V = 15


def entropy_rows():
    """Rows of every strategy, with settings of their own, by the strategy that they are to reach."""
    rng = np.random.default_rng(6)
    one_hot = np.where(np.arange(VOCAB) == 37, 30.0, 0.0)
    flat = 1e-3 * rng.standard_normal(VOCAB)
    peaked = PEAKED[rng.permutation(VOCAB)]
    wide = [1.1 * rng.standard_normal(VOCAB) for _ in range(8)]
    changed = {"prompt": (1, 2, 3), "generated": tuple(range(40)), "allowed": list(range(0, VOCAB, 2))}
    cases = {
        Strategy.GREEDY: [
            ({}, {"logits": one_hot}),
            ({"temperature": 0.0, "pause_token": 8}, {"logits": flat}),
            ({}, {"logits": one_hot, "allowed": [5, 6]}),
        ],
        Strategy.PAUSE: [
            ({"pause_token": 8}, {"logits": flat}),
            ({"pause_token": 8}, {"logits": flat, "last": 8}),  # not twice
            ({"pause_token": 8}, {"logits": flat, "allowed": list(range(9, 140))}),  # not when masked
            ({"pause_token": 0}, {"logits": flat, "last": 8}),
            ({}, {"logits": flat, "last": -1}),  # none is set
            ({"top_k": 100, "top_p": 1.0, "min_p": 0.0}, {"logits": flat}),
        ],
        Strategy.EXPLORE: [
            ({}, {"logits": peaked}),
            ({"top_k": 3, "explore_min_top_k": 60, "top_p": 1.0, "min_p": 0.0}, {"logits": peaked}),
            ({"temperature": 2.0}, {"logits": peaked, **changed}),
        ],
        Strategy.RESAMPLE: [
            ({"high_entropy": 2.5, "medium_entropy": 2.0}, {"logits": peaked}),
            ({"high_entropy": 2.5, "medium_entropy": 2.0, "min_p": 0.0, "top_k": 100}, {"logits": peaked, **changed}),
        ],
        Strategy.ADAPTIVE: [
            *(({}, {"logits": logits}) for logits in wide[:4]),
            ({"candidates": 1}, {"logits": wide[4]}),
            ({"candidates": MAX_CANDIDATES, "top_k": 100, "min_p": 0.0}, {"logits": wide[5]}),
            ({"candidates": 3, "temperature": 3.0, "top_p": 1.0}, {"logits": wide[6], **changed}),
            ({"candidates": 2, "adaptive_max_top_k": 4}, {"logits": np.round(wide[7])}),
        ],
    }
    rows, reached = [], []
    for strategy, of_strategy in cases.items():
        for given, about in of_strategy:
            settings = EntropySettings(**given)
            # What the request has of its own is not looked at, but for penalties.
            params = SamplingParams(seed=len(rows) + 2**33, entropy=settings, temperature=0.0, top_k=1)
            if "generated" in about:
                params = dataclasses.replace(params, presence_penalty=1.0, repetition_penalty=1.5, logit_bias={4: 2.0})
            attention = (rng.uniform(0, 3), rng.uniform(0, 2), rng.uniform(0, 0.5), rng.uniform(0, 3))
            rows.append(Row(params=params, position=len(rows), attention=attention, **about))
            reached.append(strategy)
    return rows, reached


def by_specification(row):
    """The token that the entropy sampler chooses, and how it decided."""
    logits, settings = np.float32(row.logits), row.params.entropy
    h, v = entropy_spec.logit_metrics(logits)
    pause = settings.pause_token
    may_pause = pause is not None and np.isfinite(row.processed[pause])
    decision = entropy_spec.decide(h, v, np.float32(row.attention), settings, row.last, may_pause)
    if decision.forced >= 0:
        return decision.forced, decision
    drawn = [spec.drawn(row.processed, decision, row.noise(i)) for i in range(decision.candidates)]
    logprobs = spec.log_softmax(logits)[drawn]
    return drawn[int(np.argmax(logprobs))], decision


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)], ids=str)
def test_entropy_sampler(mesh_shape):
    """Every strategy, with its effective settings; of several draws the likeliest is kept."""
    rows, reached = entropy_rows()
    rows += rows[: 32 - len(rows)]
    found = run(rows, mesh_shape, Mode.ENTROPY)
    better = 0
    for i, row in enumerate(rows):
        token, decision = by_specification(row)
        metrics = token_metrics(found.metrics_RE[i])
        if i < len(reached):
            assert metrics.strategy == reached[i]
        assert Strategy(metrics.strategy).name == decision.strategy
        ours = (metrics.temperature, metrics.top_p, metrics.top_k, metrics.min_p)
        assert ours == pytest.approx((decision.temperature, decision.top_p, decision.top_k, decision.min_p), rel=1e-4)
        h, v = entropy_spec.logit_metrics(np.float32(row.logits))
        assert (metrics.entropy, metrics.varentropy) == pytest.approx((h, v), rel=1e-4, abs=1e-4)
        assert found.metrics_RE[i, 2:6] == pytest.approx(np.float32(row.attention))
        assert found.tokens_R[i] == token, (i, decision)
        better += decision.candidates > 1 and token != spec.drawn(row.processed, decision, row.noise())
    assert better >= 2, "where the first draw is always the best nothing is shown of the choice"
    check_logprobs(found, rows)


def test_pause_tokens_by_hand():
    rows, reached = entropy_rows()
    tokens = run(rows, mode=Mode.ENTROPY).tokens_R
    first = reached.index(Strategy.PAUSE)
    assert tokens[first] == 8
    assert tokens[first + 1] != 8, "twice in a row"
    assert 9 <= tokens[first + 2] < 140, "masked"
    assert tokens[first + 3] == 0
    assert tokens[reached.index(Strategy.GREEDY) + 1] != 8, "temperature 0 is greedy throughout"


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)], ids=str)
def test_rows_without_settings_are_drawn_as_ever(mesh_shape):
    """Beside rows of the entropy sampler, with the same log-probabilities and most likely tokens."""
    with_settings, plain = entropy_rows()[0], mixed_rows()
    rows = [row for pair in zip(with_settings[:16], plain[:16], strict=True) for row in pair]
    found = run(rows, mesh_shape, Mode.ENTROPY)
    assert found.tokens_R[1::2].tolist() == [row.expected for row in plain[:16]]
    alone = run(plain, mesh_shape, Mode.LOGPROBS)
    np.testing.assert_array_equal(found.top_tokens_RJ[1::2], alone.top_tokens_RJ[:16])
    np.testing.assert_allclose(found.logprobs_R[1::2], alone.logprobs_R[:16], rtol=1e-6, atol=1e-6)
