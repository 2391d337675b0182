"""How a batch is laid out: plain arithmetic, no device."""

import pytest
from hypothesis import given, settings, strategies as st

from sharded_llama.engine.batch import MIN_CACHE_BUCKET, PREFILL_TOKENS, bucket, plan_batch


@given(st.integers(1, 200_000), st.sampled_from([16, 64]))
def test_bucket(n, minimum):
    size = bucket(n, minimum)
    assert n <= size < max(n + minimum, 1.26 * n)
    assert size % minimum == 0
    assert bucket(size, minimum) == size


def test_four_buckets_per_octave():
    assert len({bucket(n, 16) for n in range(1025, 2049)}) == 4


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 500)), min_size=1, max_size=70),
    st.sampled_from([1, 2, 3, 4]),
)
def test_plan(requests, data):
    lengths, max_new = zip(*requests, strict=True)
    plan = plan_batch(lengths, max_new, data)
    placed = [r for r in plan.rows if r is not None]
    assert sorted(placed) == list(range(len(requests))), "every request has one row"
    assert plan.batch % data == 0
    per_shard = plan.batch // data
    counts = [sum(r is not None for r in plan.rows[s * per_shard : (s + 1) * per_shard]) for s in range(data)]
    assert max(counts) - min(counts) <= 1, "data shards carry the same load"
    for row, request in enumerate(plan.rows):
        if request is not None:
            group = row % per_shard // plan.group_rows
            assert lengths[request] <= plan.group_lengths[group], "a prompt fits its group's padded length"
            assert lengths[request] + max_new[request] - 1 <= plan.cache_length
    assert plan.group_rows == 1 or plan.group_rows * max(plan.group_lengths) <= PREFILL_TOKENS
    assert per_shard % plan.group_rows == 0
    assert plan.cache_length % MIN_CACHE_BUCKET == 0
    assert max(plan.group_lengths) <= plan.cache_length


@pytest.mark.parametrize(("n", "rows"), [(1, 2), (2, 2), (3, 4), (5, 8)])
def test_batches_are_powers_of_two_per_shard(n, rows):
    assert plan_batch([4] * n, [4] * n, 2).batch == rows
