"""What is measured of two arrays, by values that can be worked out by hand."""

import math

import ml_dtypes
import numpy as np
import pytest

from sharded_llama.parity.contract import distance
from sharded_llama.parity.measure import kl_divergence, measure, top_k_agreement
from sharded_llama.parity.results import Worst

NAN, INF = math.nan, math.inf
not_finite = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def array(values: object, dtype: object = np.float32) -> np.ndarray:
    return np.array(values, dtype)


def logits(*probabilities: float) -> np.ndarray:
    """Logits of one position, of which the softmax does not see a constant."""
    return np.log(np.array([probabilities])) + 7


class TestDistance:
    def test_norm_of_the_difference_over_norm_of_the_reference(self):
        assert distance(array([6, 12]), array([3, 4])) == pytest.approx(math.hypot(3, 8) / 5)
        assert distance(array([[3], [4]]), array([[6], [12]])) == pytest.approx(math.hypot(3, 8) / math.hypot(6, 12))

    def test_is_taken_in_float64(self):
        """1 + 2^-30 is 1 in float32, and 300 squared is beyond float16."""
        assert distance(array([1 + 2**-30], np.float64), array([1])) == 2**-30
        close = distance(array([300, 0], np.float16), array([300, 3], np.float16))
        assert close == pytest.approx(3 / math.hypot(300, 3), rel=1e-12)

    def test_a_reference_of_zeros(self):
        assert distance(array([0, -0.0]), array([0, 0])) == 0
        assert distance(array([0, 1e-30]), array([0, 0])) == INF

    @not_finite
    @pytest.mark.parametrize(
        ("ours", "theirs"), [(NAN, 1), (1, NAN), (NAN, NAN), (INF, 1), (1, INF), (INF, INF), (-INF, INF)]
    )
    def test_values_that_are_not_finite(self, ours, theirs):
        assert math.isnan(distance(array([ours, 1]), array([theirs, 1])))


class TestMeasure:
    def test_equal_arrays_have_no_worst_place(self):
        difference = measure(array([[1, 2], [3, 4]]), array([[1, 2], [3, 4]]))
        assert difference == (0, 0, 1, None)

    def test_the_place_and_the_values_of_the_largest_difference(self):
        theirs = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
        ours = theirs.copy()
        ours[0, 1, 2] += 0.5
        ours[1, 2, 0] -= 2
        difference = measure(ours, theirs)
        assert difference.worst == Worst((1, 2, 0), 18, 20)
        assert difference.max_abs == 2
        assert difference.relative == pytest.approx(math.hypot(0.5, 2) / math.sqrt(sum(i * i for i in range(24))))
        assert difference.bit_equal == 22 / 24
        assert all(type(i) is int for i in difference.worst.position)

    def test_of_several_largest_differences_the_first(self):
        assert measure(array([[0, 1], [1, 0]]), array([[0, 0], [0, 0]])).worst.position == (0, 1)

    def test_positions_name_the_head_of_which_there_are_copies(self):
        """Two kv heads of one channel, three copies of each: the fifth is a copy of the second head."""
        theirs = array([[[[1], [1], [1], [2], [2], [2]]]])
        ours = theirs.copy()
        ours[0, 0, 4, 0] = 7
        assert measure(ours, theirs, copies=3).worst == Worst((0, 0, 1, 0), 7, 2)
        assert measure(ours, theirs).worst == Worst((0, 0, 4, 0), 7, 2)

    def test_rows_that_repeat_the_first_one_are_called_so(self):
        theirs = array([[1, 2], [3, 4], [1, 2], [1, 2]])
        ours = theirs.copy()
        ours[3, 1] = 9
        assert measure(ours, theirs, rows=2).worst == Worst((0, 1), 9, 2)
        ours[1, 0] = -9
        assert measure(ours, theirs, rows=2).worst == Worst((1, 0), -9, 3)

    @pytest.mark.parametrize("chunk", [1, 4, 5, 24, 99])
    def test_large_arrays_are_measured_in_parts(self, chunk, monkeypatch):
        monkeypatch.setattr("sharded_llama.parity.measure.CHUNK", chunk)
        theirs = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
        ours = theirs.copy()
        ours[0, 0, 1] += 3
        ours[0, 2, 1] -= 4
        ours[1, 2, 3] += 4  # the second of two largest differences
        difference = measure(ours, theirs)
        assert difference.worst == Worst((0, 2, 1), 5, 9)
        assert difference.relative == pytest.approx(math.sqrt(9 + 16 + 16) / math.sqrt(sum(i * i for i in range(24))))
        ours[1, 0, 0] = NAN
        ours[1, 0, 1] = NAN
        assert measure(ours, theirs).worst.position == (1, 0, 0)

    def test_no_values_are_equal(self):
        assert measure(array([]).reshape(0, 3), array([]).reshape(0, 3)) == (0, 0, 1, None)

    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
    def test_equal_bits_are_counted(self, dtype):
        """Zeros of two signs are equal values of different bits; a NaN has the bits of itself."""
        next_to_one = 1 + float(ml_dtypes.finfo(dtype).eps)
        ours = array([0.0, 1, next_to_one, NAN], dtype)
        with np.errstate(invalid="ignore"):
            difference = measure(ours, array([-0.0, 1, 1, NAN], dtype))
        assert difference.bit_equal == 0.5
        assert measure(ours[:3], array([0.0, 1, 1], dtype)).max_abs == next_to_one - 1

    def test_arrays_that_do_not_lie_in_order_in_memory(self):
        theirs = array([[1, 2, 3], [4, 5, 6]])
        ours = np.asfortranarray(theirs)
        ours[1, 0] = 0
        assert measure(ours, theirs)[2:] == (5 / 6, Worst((1, 0), 0, 4))
        assert measure(theirs[:, ::2], theirs[:, 1:]).bit_equal == 0.5

    def test_of_two_types_equal_values_are_counted(self):
        """1.5 is a value of both types, 1 + 2^-20 of float32 alone."""
        difference = measure(array([1.5, 1], ml_dtypes.bfloat16), array([1.5, 1 + 2**-20]))
        assert difference.bit_equal == 0.5
        assert difference.max_abs == 2**-20
        assert difference.worst == Worst((1,), 1, 1 + 2**-20)

    @not_finite
    def test_the_first_nan_is_the_worst_value(self):
        difference = measure(array([9, 1, NAN, NAN]), array([0, 1, 1, 1]))
        assert math.isnan(difference.max_abs)
        assert math.isnan(difference.relative)
        assert difference.worst.position == (2,)
        assert math.isnan(difference.worst.ours)
        assert difference.worst.theirs == 1
        assert difference.bit_equal == 0.25


class TestKL:
    def test_is_zero_of_equal_distributions(self):
        assert kl_divergence(logits(0.5, 0.25, 0.25), logits(0.5, 0.25, 0.25) - 100) == pytest.approx(0, abs=1e-15)

    def test_is_of_ours_from_the_reference_in_nats(self):
        """By the definition: the sum of p log(p / q) with the reference's p. It is not symmetric."""
        ours, theirs = logits(0.25, 0.75), logits(0.5, 0.5)
        assert kl_divergence(ours, theirs) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
        assert kl_divergence(theirs, ours) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))

    def test_has_a_value_for_each_position(self):
        ours = np.stack([logits(0.5, 0.5), logits(0.25, 0.75)], axis=1)
        theirs = np.stack([logits(0.5, 0.5), logits(0.5, 0.5)], axis=1)
        divergence = kl_divergence(ours, theirs)
        assert divergence.shape == (1, 2)
        assert divergence[0, 0] == 0
        assert divergence[0, 1] == pytest.approx(0.5 * math.log(4 / 3))

    def test_large_logits_do_not_overflow(self):
        """Far-away tokens have no weight: what is left is log 2 for the one that ours does not favour."""
        ours, theirs = array([[2000, 2000, -2000]]), array([[2000, -2000, -2000]])
        assert kl_divergence(ours, theirs) == pytest.approx(math.log(2))

    def test_is_never_negative(self):
        x = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
        assert (kl_divergence(x, x + np.float32(3)) >= 0).all()

    @not_finite
    def test_values_that_are_not_finite(self):
        divergence = kl_divergence(array([[NAN, 1], [0, 1]]), array([[0, 1], [0, 1]]))
        assert np.isnan(divergence).tolist() == [True, False]


class TestTopK:
    OURS = array([[[5, 4, 3, 2, 1], [1, 2, 3, 4, 5]]])

    @pytest.mark.parametrize(
        ("k", "theirs", "share"),
        [
            (1, [[9, 4, 3, 2, 1], [1, 2, 3, 5, 4]], (1 + 0) / 2),
            (2, [[4, 5, 3, 2, 1], [1, 2, 5, 3, 4]], (1 + 1 / 2) / 2),  # of two in another order, of two with another
            (3, [[1, 2, 4, 3, 5], [1, 5, 3, 2, 4]], (1 / 3 + 2 / 3) / 2),
            (5, [[1, 2, 3, 4, 5], [2, 5, 1, 3, 4]], 1),
            (99, [[1, 2, 3, 4, 5], [2, 5, 1, 3, 4]], 1),
        ],
    )
    def test_share_of_their_tokens_among_ours(self, k, theirs, share):
        assert top_k_agreement(self.OURS, array([theirs]), k) == pytest.approx(share)

    def test_of_equal_logits_the_lower_token_comes_first(self):
        assert top_k_agreement(array([[1, 1, 0]]), array([[2, 1, 1]]), 1) == 1
        assert top_k_agreement(array([[1, 1, 0]]), array([[0, 1, 1]]), 1) == 0

    def test_types_may_differ(self):
        assert top_k_agreement(array([[1, 2, 3]], ml_dtypes.bfloat16), array([[1, 2, 3]], np.float64), 2) == 1
