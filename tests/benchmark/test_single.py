"""How a decode measurement is planned, against steps that are counted one by one."""

import math

import pytest

from sharded_llama.benchmark import peers, single, steady
from sharded_llama.benchmark.single import plan_decode
from sharded_llama.engine.options import Sizes

ACCELERATOR = Sizes(slots=256, max_tokens=2304, block=16, max_blocks=128, decode_steps=1, run_length=1, shapes=())


@pytest.mark.parametrize(("batch", "context"), [(1, 512), (8, 512), (64, 512), (256, 512), (256, 2048), (256, 200)])
def test_the_context_is_that_of_the_middle(batch, context):
    rounds, steps = 3, 32
    plan = plan_decode(ACCELERATOR, 1, batch, context, steps, rounds)
    # Prompts are computed in order, as many blocks of all of them in a step as there is room for.
    blocks = math.ceil(plan.prompt / ACCELERATOR.block)
    first_token = [math.ceil((i + 1) * blocks / ACCELERATOR.max_blocks) for i in range(batch)]
    lengths = [plan.prompt + 1 + first_token[-1] - first for first in first_token]
    timed = steady.GUARD + rounds * (steady.GUARD + steps)
    middle = sum(lengths) / batch + timed / 2
    assert middle == pytest.approx(context, abs=8)
    assert max(lengths) + timed <= plan.longest


def test_rest_before_each_sample(monkeypatch):
    """Ours and a peer's alike; it is no part of what is measured."""
    calls = []
    monkeypatch.setattr("time.sleep", lambda seconds: calls.append(f"rest {seconds}"))

    class ToyPeer:
        def prefill_ms(self, rows, tokens):
            calls.append("theirs")
            return 2.0

    samplers = [lambda: calls.append("a") or 1.0, lambda: calls.append("b") or 2.0]
    assert single.interleaved(2, samplers, 300) == [[1.0, 1.0], [2.0, 2.0]]
    assert calls == ["rest 0.3", "a", "rest 0.3", "b"] * 2
    calls.clear()
    rows = [{"what": "prefill", "rows": 1, "tokens": 8, "ms": 1.0}]
    (row,) = peers.complete(rows, "hf", ToyPeer(), steps=1, rounds=2, rest_ms=300)
    assert calls == ["rest 0.3", "theirs"] * 3  # the first to warm up
    assert row["speed_ours_over_peer"] == 2
