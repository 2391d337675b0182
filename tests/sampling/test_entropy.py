"""The entropy sampler against its specification in NumPy, and its settings against their bounds."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sampling import entropy_spec as spec

from sharded_llama.errors import RequestError
from sharded_llama.mesh import make_mesh
from sharded_llama.sampling.entropy import (
    Choice,
    Strategy,
    TokenMetrics,
    best_candidate,
    choose_strategy,
    logit_metrics,
    stack_metrics,
    token_metrics,
)
from sharded_llama.sampling.entropy_settings import (
    N_SETTINGS,
    NO_TOKEN,
    EntropySettings,
    SettingColumns,
    pack_settings,
    unpack_settings,
)
from sharded_llama.sharding import DATA, SPECS, padded

VOCAB = 1003
MESHES = [(1, 1), (2, 4), (1, 8)]


@functools.cache
def on_mesh(data, model):
    """`logit_metrics` of global rows (R, VOCAB), padded and split as in a step."""
    run = jax.jit(
        jax.shard_map(
            logit_metrics,
            mesh=make_mesh(data, model),
            in_specs=SPECS["last_logits"],
            out_specs=(SPECS["tokens"], SPECS["tokens"]),
        )
    )

    def metrics(logits_RV):
        padding = [(0, 0), (0, padded(logits_RV.shape[1], model) - logits_RV.shape[1])]
        return [np.asarray(x) for x in run(np.pad(np.float32(logits_RV), padding, constant_values=-np.inf))]

    return metrics


def rows_of_logits():
    """Random and adversarial rows, an even number."""
    rng = np.random.default_rng(0)
    flat, one_hot, two, masked = (np.zeros(VOCAB) for _ in range(4))
    one_hot[17] = 1e30
    two[[3, VOCAB - 1]] = 60.0
    masked[:] = -np.inf
    masked[[5, 400, 1002]] = 1.0, 2.0, 3.0
    only = np.full(VOCAB, -np.inf)
    only[VOCAB - 1] = -1e30
    spread = np.linspace(-1e4, 1e4, VOCAB)
    outlier = np.full(VOCAB, -5.0)
    outlier[0] = 2.0
    lowest = rng.standard_normal(VOCAB)
    lowest[::3] = np.finfo(np.float32).min
    random = [scale * rng.standard_normal(VOCAB) for scale in (0.01, 0.5, 1, 3, 10, 100)]
    return np.stack([flat, flat - 1e4, one_hot, two, masked, only, spread, outlier, lowest, 7 + outlier, *random])


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_metrics_of_logits(mesh):
    logits = rows_of_logits()
    ours = np.stack(on_mesh(*mesh)(logits), axis=1)
    exact = np.array([spec.logit_metrics(row) for row in np.float32(logits)])
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, exact, rtol=2e-5, atol=2e-6)


def test_metrics_of_known_distributions():
    """Flat: log2 of the size, and no variance. Two equal tokens: one bit. One token: nothing."""
    h, v = on_mesh(1, 8)(rows_of_logits()[[0, 3, 2, 5]])
    np.testing.assert_allclose(h, [math.log2(VOCAB), 1, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(v, 0, atol=1e-6)


def test_metrics_of_a_row_do_not_depend_on_the_others():
    logits = rows_of_logits()
    together = on_mesh(1, 8)(logits)
    for row in range(0, len(logits), 5):
        alone = on_mesh(1, 8)(np.tile(logits[row], (len(logits), 1)))
        np.testing.assert_array_equal([x[3] for x in alone], [x[row] for x in together])


def rounded(settings):
    """The settings as float32 holds them."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    values = {name: float(np.float32(x)) if isinstance(x, float) else x for name, x in values.items()}
    return dataclasses.replace(settings, **values)


def choose(h, v, attention, settings, last_token=None, pause_allowed=None):
    """`choose_strategy` of rows with a list of settings, on the host."""
    n = len(settings)
    packed = unpack_settings(jnp.asarray(np.stack([pack_settings(s) for s in settings])))
    last_token = np.full(n, NO_TOKEN, np.int32) if last_token is None else np.int32(last_token)
    pause_allowed = np.ones(n, bool) if pause_allowed is None else np.array(pause_allowed)
    args = (np.float32(h), np.float32(v), np.float32(attention), packed, last_token, pause_allowed)
    return jax.tree.map(np.asarray, jax.jit(choose_strategy)(*args))


def assert_decided(choice: Choice, row, expected: spec.Decision):
    assert Strategy(choice.strategy_R[row]).name == expected.strategy
    effective = choice.temperature_R[row], choice.top_p_R[row], choice.min_p_R[row]
    np.testing.assert_allclose(effective, (expected.temperature, expected.top_p, expected.min_p), rtol=1e-5)
    assert choice.top_k_R[row] == expected.top_k
    assert choice.n_candidates_R[row] == expected.candidates
    assert choice.forced_R[row] == expected.forced


CALM = (1.0, 0.2, 0.001, 0.4)  # attention metrics: aH, aV, agree, inter


class TestStrategy:
    @pytest.mark.parametrize(
        ("h", "v", "strategy"),
        [
            (0.05, 0.05, "GREEDY"),
            (6.0, 0.05, "PAUSE"),
            (0.05, 6.0, "EXPLORE"),
            (4.0, 6.0, "EXPLORE"),  # comes before resample
            (5.5, 6.0, "RESAMPLE"),
            (5.0, 6.0, "RESAMPLE"),  # limits belong to neither side
            (2.0, 2.0, "ADAPTIVE"),
            (0.05, 1.0, "ADAPTIVE"),
            (3.0, 0.05, "ADAPTIVE"),
            (6.0, 1.0, "ADAPTIVE"),
            (6.0, 5.0, "ADAPTIVE"),
        ],
    )
    def test_every_row_of_the_table(self, h, v, strategy):
        settings = rounded(EntropySettings())
        expected = spec.decide(h, v, CALM, settings)
        assert expected.strategy == strategy
        assert_decided(choose([h], [v], [CALM], [settings]), 0, expected)

    def test_limits_are_strict(self):
        s = EntropySettings(low_entropy=0.25, low_varentropy=0.25, medium_entropy=3.0)
        choice = choose([0.25, 0.0, 5.0, 5.0], [0.0, 0.25, 0.0, 5.0], [CALM] * 4, [s] * 4)
        assert set(choice.strategy_R) == {Strategy.ADAPTIVE}

    def test_known_numbers(self):
        """The formulas with the constants of the specification, by hand."""
        h, v = [6.0, 2.0, 6.0, 2.0], [0.0, 6.0, 6.0, 1.0]
        attention = [[2.0, 0.1, 0.0, 0.5], [2.0, 0.1, 0.5, 0.5], [1.0, 0.5, 0.0, 0.5], [1.0, 0.5, 0.25, 0.5]]
        choice = choose(h, v, attention, [EntropySettings(temperature=0.5)] * 4)
        assert [Strategy(x).name for x in choice.strategy_R] == ["PAUSE", "EXPLORE", "RESAMPLE", "ADAPTIVE"]
        temperatures = [0.5 * 1.7, 0.5 * 1.35, 0.5 * 2.25, 0.5 * (1 + 0.9 + 0.3 - 0.05)]
        np.testing.assert_allclose(choice.temperature_R, temperatures, rtol=1e-6)
        np.testing.assert_allclose(choice.top_p_R, [0.9, 0.9, 0.7, 0.9 * 1.05], rtol=1e-6)
        np.testing.assert_array_equal(choice.top_k_R, [27, 33, 27, 30])  # floor(33.75), round(29.7)
        np.testing.assert_allclose(choice.min_p_R, [0.03, 0.03, 0.03, 0.01], rtol=1e-6)
        np.testing.assert_array_equal(choice.n_candidates_R, [1, 1, 1, 5])
        score = 0.1 * (1 - 2) + 0.2 * 0 + 0.3 * 0 + 0.4 * 0.5 + 0.5 * 0.25 + 0.6 * 0.5
        assert choice.confidence_R[3] == pytest.approx(score, rel=1e-6)

    def test_temperatures_stop_at_their_limits(self):
        attention = [[9.0, 9.0, 0.0, 9.0]] * 3
        choice = choose([6.0, 2.0, 6.0], [0.0, 6.0, 6.0], attention, [EntropySettings()] * 3)
        np.testing.assert_array_equal(choice.temperature_R, [1.5, 1.5, 2.0])
        assert choice.top_p_R[2] == 0.5

    def test_temperature_0_is_greedy_everywhere(self):
        h, v = np.meshgrid([0.05, 2.0, 4.0, 6.0], [0.05, 2.0, 6.0])
        settings = [EntropySettings(temperature=0, pause_token=3)] * h.size
        choice = choose(h.ravel(), v.ravel(), [CALM] * h.size, settings)
        assert set(choice.strategy_R) == {Strategy.GREEDY}
        assert set(choice.temperature_R) == {0.0}
        assert set(choice.forced_R) == {NO_TOKEN}

    def test_pause_is_forced_only_where_it_may_be(self):
        """Set; not what came before; not masked. Else the row is drawn, hotter."""
        with_pause, without = EntropySettings(pause_token=7), EntropySettings()
        settings = [with_pause, with_pause, with_pause, without, with_pause]
        choice = choose(
            [6.0] * 4 + [2.0], [0.0] * 5, [CALM] * 5, settings, [2, 7, 2, 2, 2], [True] * 2 + [False, True, True]
        )
        np.testing.assert_array_equal(choice.forced_R, [7, -1, -1, -1, -1])
        np.testing.assert_array_equal(choice.strategy_R[:4], Strategy.PAUSE)
        np.testing.assert_allclose(choice.temperature_R[:4], [0, *[np.float32(0.666) * 1.5] * 3], rtol=1e-6)

    def test_no_pause_token_is_not_the_token_before_the_first(self):
        """NO_TOKEN in both places is not a pause token that was chosen."""
        choice = choose([6.0], [0.0], [CALM], [EntropySettings()], [NO_TOKEN])
        assert choice.forced_R[0] == NO_TOKEN
        assert choice.temperature_R[0] > 0

    def test_random_rows_and_settings(self):
        """Rows of their own settings side by side; those within rounding of a limit are left out."""
        rng = np.random.default_rng(1)
        settings = [random_settings(rng) for _ in range(600)]
        h, v = np.float32(rng.choice([0.05, 1.0, 4.0, 8.0], (2, 600)) * rng.uniform(0.5, 1.5, (2, 600)))
        attention = np.float32(rng.uniform(0, [6, 4, 0.5, 3], (600, 4)))
        last, allowed = rng.integers(0, 4, 600), rng.random(600) < 0.8
        choice = choose(h, v, attention, settings, last, allowed)
        reached = {strategy.name: 0 for strategy in Strategy}
        for row, s in enumerate(settings):
            args = float(h[row]), float(v[row]), np.float64(attention[row]), rounded(s)
            if near_a_limit(*args):
                continue
            expected = spec.decide(*args, last[row], allowed[row])
            assert_decided(choice, row, expected)
            np.testing.assert_allclose(choice.confidence_R[row], spec.confidence(*args), rtol=1e-4, atol=1e-4)
            reached[expected.strategy] += 1
        assert min(reached.values()) > 20, reached


def random_settings(rng):
    """Every number within its bounds, but of the usual size."""
    low, medium, high = np.sort(rng.uniform(0.05, 8, 3))
    low_v, high_v = np.sort(rng.uniform(0.05, 8, 2))
    changed = {
        f.name: float(f.default * rng.uniform(0.5, 1.0))
        for f in dataclasses.fields(EntropySettings)
        if f.type is float and f.name != "adaptive_max_top_p"
    }
    limits = {"low_entropy": low, "medium_entropy": medium, "high_entropy": high}
    limits |= {"low_varentropy": low_v, "high_varentropy": high_v, "adaptive_max_min_p": 0.5}
    pause = None if rng.random() < 0.3 else int(rng.integers(0, 4))
    whole = {"top_k": int(rng.integers(1, 101)), "candidates": int(rng.integers(1, 17)), "pause_token": pause}
    return EntropySettings(
        **changed | limits | whole | {"temperature": float(rng.choice([0.0, 0.3, 1.0], p=[0.1, 0.4, 0.5]))}
    )


def near_a_limit(h, v, attention, s):
    """Whether rounding in float32 can turn a comparison, or a whole number."""
    limits = [h - s.low_entropy, h - s.medium_entropy, h - s.high_entropy, v - s.low_varentropy, v - s.high_varentropy]
    _, _, agree, inter = attention
    explore = s.top_k * (1 + s.explore_disagreement * (1 - agree))
    adaptive = s.top_k * (1 + s.adaptive_top_k_interaction * inter - s.adaptive_top_k_agreement * agree) + 0.5
    limits += [explore - round(explore), adaptive - round(adaptive)]
    return min(map(abs, limits)) < 1e-3


class TestCandidates:
    def test_the_most_likely_of_those_drawn(self):
        """Draws of the specified distribution; the score that the specification gives each."""
        rng = np.random.default_rng(2)
        logits = rng.standard_normal(VOCAB) * 2
        h, v = spec.logit_metrics(logits)
        s = EntropySettings(medium_entropy=20.0, high_entropy=20.0, high_varentropy=100.0)
        decision = spec.decide(h, v, CALM, s)
        assert decision.strategy == "ADAPTIVE"
        tokens = rng.choice(VOCAB, (200, 16), p=spec.filtered(logits, decision))
        assert len(np.unique(tokens)) > 10
        counts = rng.integers(1, 17, 200)
        log_probs = np.float32(np.log(spec.softmax(logits)))[tokens]
        ours = jax.jit(best_candidate)(log_probs, np.int32(counts))
        theirs = [spec.best_candidate(logits, t[:n], h, v, CALM, s) for t, n in zip(tokens, counts, strict=True)]
        np.testing.assert_array_equal(ours, theirs)

    def test_the_first_of_equals_and_none_beyond_the_count(self):
        logprobs = np.float32([[-2, -1, -1, -0.5], [-2, -1, -1, -0.5], [-2, -1, -1, -0.5], [-np.inf] * 4])
        np.testing.assert_array_equal(best_candidate(logprobs, np.int32([1, 3, 4, 4])), [0, 1, 3, 0])


def test_filters_of_the_specification():
    """Each filter on the renormalised result of the one before, the nucleus from the most likely token on."""
    logits = np.log([0.1, 0.4, 0.2, 0.25, 0.05])
    decision = spec.Decision("EXPLORE", 1.0, 1.0, 5, 0.0)
    np.testing.assert_allclose(spec.filtered(logits, decision), [0.1, 0.4, 0.2, 0.25, 0.05])
    decision.min_p = 0.2
    np.testing.assert_allclose(spec.filtered(logits, decision), np.array([0.1, 0.4, 0.2, 0.25, 0]) / 0.95)
    decision.top_k = 3
    np.testing.assert_allclose(spec.filtered(logits, decision), np.array([0, 0.4, 0.2, 0.25, 0]) / 0.85)
    decision.top_p = 0.76  # of all tokens 0.65 would not be enough; of those left 0.65 / 0.85 is
    np.testing.assert_allclose(spec.filtered(logits, decision), np.array([0, 0.4, 0, 0.25, 0]) / 0.65)
    decision.temperature = 0.0
    np.testing.assert_array_equal(spec.filtered(logits, decision), [0, 1, 0, 0, 0])


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_all_of_it_on_a_mesh(mesh):
    """From split logits to what a caller sees, in one compiled function: settings are values, not shapes."""
    logits = rows_of_logits()
    n_rows = len(logits)
    rng = np.random.default_rng(3)
    settings = [random_settings(rng) for _ in range(n_rows)]
    attention = np.float32(rng.uniform(0, [6, 4, 0.5, 3], (n_rows, 4)))

    def local(logits_RV, attention_R4, packed_RX):
        h_R, v_R = logit_metrics(logits_RV)
        last_R = jnp.full(h_R.shape, NO_TOKEN)
        choice = choose_strategy(h_R, v_R, attention_R4, unpack_settings(packed_RX), last_R, last_R < 0)
        return stack_metrics(h_R, v_R, attention_R4, choice)

    specs = SPECS["last_logits"], P(DATA), P(DATA)
    run = jax.jit(jax.shard_map(local, mesh=make_mesh(*mesh), in_specs=specs, out_specs=P(DATA)))
    padding = [(0, 0), (0, padded(VOCAB, mesh[1]) - VOCAB)]
    split = np.pad(np.float32(logits), padding, constant_values=-np.inf)
    for shift in (0, 1):
        theirs = settings[shift:] + settings[:shift]
        rows = np.asarray(run(split, attention, np.stack([pack_settings(s) for s in theirs])))
        compared = 0
        for row, s in enumerate(theirs):
            metrics = token_metrics(rows[row])
            args = metrics.entropy, metrics.varentropy, np.float64(attention[row]), rounded(s)
            exact = spec.logit_metrics(np.float32(logits[row]))
            np.testing.assert_allclose(metrics[:2], exact, rtol=2e-5, atol=2e-6)
            np.testing.assert_array_equal(metrics[2:6], attention[row])
            if near_a_limit(*args):
                continue
            expected = spec.decide(*args)
            assert Strategy(metrics.strategy).name == expected.strategy
            assert metrics.top_k == expected.top_k
            effective = expected.temperature, expected.top_p, expected.min_p, spec.confidence(*args)
            ours = metrics.temperature, metrics.top_p, metrics.min_p, metrics.score
            np.testing.assert_allclose(ours, effective, rtol=1e-4, atol=1e-5)
            compared += 1
        assert compared > n_rows / 2
    assert run._cache_size() == 1


def test_metrics_are_plain_numbers():
    metrics = token_metrics(np.float32([1, 2, 3, 4, 0.5, 6, 4, 0.25, 0.75, 27, 0.125, -8]))
    assert metrics == TokenMetrics(1.0, 2.0, 3.0, 4.0, 0.5, 6.0, Strategy.ADAPTIVE, 0.25, 0.75, 27, 0.125, -8.0)
    kinds = {name: type(value) for name, value in metrics._asdict().items()}
    assert {name for name, kind in kinds.items() if kind is int} == {"strategy", "top_k"}
    assert set(kinds.values()) == {int, float}


class TestSettings:
    def test_defaults_are_those_of_the_specification(self):
        s = EntropySettings()
        assert (s.temperature, s.top_p, s.top_k, s.min_p, s.candidates, s.pause_token) == (
            0.666,
            0.9,
            27,
            0.03,
            5,
            None,
        )
        assert (s.low_entropy, s.medium_entropy, s.high_entropy) == (0.1, 3.0, 5.0)
        assert (s.low_varentropy, s.high_varentropy) == (0.1, 5.0)

    def test_packed_and_unpacked(self):
        given = [EntropySettings(), EntropySettings(top_k=100, pause_token=2**24 - 1, score_agreement=0.75)]
        packed = np.stack([pack_settings(s) for s in given])
        assert packed.shape == (2, N_SETTINGS)
        assert packed.dtype == np.float32
        columns = unpack_settings(packed)
        names = [f.name for f in dataclasses.fields(EntropySettings)]
        assert SettingColumns._fields == tuple(names)
        for name in names:
            values = [getattr(s, name) for s in given]
            expected = np.float32([NO_TOKEN if x is None else x for x in values])
            np.testing.assert_array_equal(getattr(columns, name), expected)
        assert int(columns.pause_token[1]) == 2**24 - 1

    @pytest.mark.parametrize("field", dataclasses.fields(EntropySettings), ids=lambda f: f.name)
    def test_every_setting_is_checked(self, field):
        for wrong in (-0.001, math.nan, math.inf, True, "1", [1.0], 1e9 + 0.5, 10**400):
            with pytest.raises(RequestError, match=rf"{field.name}=.* must be"):
                EntropySettings(**{field.name: wrong})

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"temperature": 100.5}, "temperature=100.5 must be a number from 0 to 100"),
            ({"top_p": 0}, "top_p=0 must be a number above 0 and at most 1"),
            ({"top_p": 1.01}, "top_p=1.01 must be"),
            ({"top_k": 0}, "top_k=0 must be a whole number from 1 to 100"),
            ({"top_k": 101}, "top_k=101 must be"),
            ({"top_k": 5.0}, "top_k=5.0 must be a whole number"),
            ({"min_p": 1.5}, "min_p=1.5 must be a number from 0 to 1"),
            ({"candidates": 0}, "candidates=0 must be a whole number from 1 to 16"),
            ({"candidates": 17}, "candidates=17 must be"),
            ({"pause_token": 2**24}, "pause_token=16777216 must be None or a token id from 0 to 16777215"),
            ({"pause_token": 3.0}, "pause_token=3.0 must be None or a token id"),
            ({"explore_temperature": 0.0}, "explore_temperature=0.0 must be a number above 0"),
            ({"adaptive_agreement": 1.5}, "adaptive_agreement=1.5 must be a number from 0 to 1"),
            ({"low_entropy": 3.5}, "low_entropy=3.5 must be at most medium_entropy=3"),
            ({"high_entropy": 2}, "medium_entropy=3.0 must be at most high_entropy=2"),
            ({"low_varentropy": 6}, "low_varentropy=6 must be at most high_varentropy=5"),
            ({"adaptive_min_top_k": 50, "adaptive_max_top_k": 40}, "adaptive_min_top_k=50 must be at most"),
            ({"adaptive_min_top_p": 0.9, "adaptive_max_top_p": 0.8}, "adaptive_min_top_p=0.9 must be at most"),
            ({"adaptive_min_min_p": 0.6}, "adaptive_min_min_p=0.6 must be at most adaptive_max_min_p=0.5"),
        ],
    )
    def test_wrong_values(self, given, message):
        with pytest.raises(RequestError, match=message):
            EntropySettings(**given)

    def test_limits_may_meet(self):
        s = EntropySettings(low_entropy=2, medium_entropy=2, high_entropy=2, low_varentropy=1, high_varentropy=1)
        assert s.high_entropy == 2

    def test_a_long_value_is_not_repeated_whole(self):
        with pytest.raises(RequestError) as error:
            EntropySettings(top_p="x" * 10_000)
        assert len(str(error.value)) < 400
