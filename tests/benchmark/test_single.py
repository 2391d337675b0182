"""How a decode measurement is planned, against steps that are counted one by one."""

import math

import pytest

from sharded_llama.benchmark import steady
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
