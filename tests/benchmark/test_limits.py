"""The arithmetic of limits, against sums done by hand."""

import pytest

from configs.llama3_1_8b import get_config
from sharded_llama.benchmark.limits import (
    BYTES,
    FLOPS,
    Ceilings,
    ModelSize,
    Work,
    decode_work,
    limit_of,
    prefill_work,
    run_limit,
)
from sharded_llama.config import LlamaConfig

H200 = Ceilings(4.3e12, 790e12)
LLAMA_8B = LlamaConfig.from_dict(get_config().model)
# Per layer: q, k, v, o 4096 x (4096 + 1024 + 1024 + 4096), gate, up, down 3 x 4096 x 14336; the output 128256 x 4096.
LAYER = 4096 * 10240 + 3 * 4096 * 14336
PARAMS = 32 * LAYER + 128256 * 4096
KV = 32 * 2 * 8 * 128 * 2  # bytes of a token


def test_the_size_of_llama_3_1_8b():
    size = ModelSize.of(LLAMA_8B)
    assert (size.layer_params, size.output_params) == (32 * LAYER, 128256 * 4096)
    assert size.matmul_bytes == 2 * PARAMS == 15_009_316_864
    assert size.kv_bytes == KV == 131_072
    assert size.pair_flops == 4 * 32 * 128 * 32
    assert size.reduces == 0


@pytest.mark.parametrize(("batch", "about"), [(1, 3.5), (8, 3.6), (64, 4.6), (256, 9.0)])
def test_decode_steps_on_one_h200(batch, about):
    limit = limit_of(decode_work(ModelSize.of(LLAMA_8B), batch, 512), H200)
    matmul = max(2 * PARAMS / 4.3e12, 2 * PARAMS * batch / 790e12)
    attention = batch * 512 * KV / 4.3e12
    assert limit.seconds == pytest.approx(matmul + attention, rel=1e-12)
    assert 1e3 * limit.seconds == pytest.approx(about, rel=0.03)
    assert limit.matmul_bound == (FLOPS if batch == 256 else BYTES)
    assert limit.attention_bound == BYTES


def test_shards_share_the_work_and_repeat_kv_heads():
    whole, half, sixteenth = (ModelSize.of(LLAMA_8B, model) for model in (1, 2, 16))
    assert 2 * half.layer_params == whole.layer_params
    assert (2 * half.output_params, 2 * half.kv_bytes) == (whole.output_params, whole.kv_bytes)
    assert half.reduces == 65
    # 16 shards of 8 kv heads hold one each: twice the cache of a sixteenth.
    assert 8 * sixteenth.kv_bytes == whole.kv_bytes
    assert sixteenth.pair_flops * 16 == whole.pair_flops
    extra = 32 * 2 * 128 * 4096 // 2 // 8 * 1  # half of a key's and a value's head is there twice
    assert sixteenth.layer_params == whole.layer_params // 16 + extra * 8


def test_an_8_bit_cache_has_scales():
    assert ModelSize.of(LLAMA_8B, kv_dtype="int8").kv_bytes == 32 * 2 * 8 * (128 + 4)


def test_all_reduces_are_added():
    size = ModelSize.of(LLAMA_8B, 2)
    alone = limit_of(decode_work(size, 1, 512), H200).seconds
    with_latency = limit_of(decode_work(size, 1, 512), H200._replace(all_reduce_s=10e-6))
    assert with_latency.seconds - alone == pytest.approx(65 * 10e-6)
    assert "65 all-reduces of 10 us" in with_latency.arithmetic(H200._replace(all_reduce_s=10e-6))


def test_a_prompt():
    work = prefill_work(ModelSize.of(LLAMA_8B), [2048, 2048])
    assert work.matmul_flops == 2 * (32 * LAYER * 4096 + 128256 * 4096 * 2)
    assert work.attention_flops == 2 * (2048 * 2049 // 2) * 4 * 32 * 128 * 32
    assert work.attention_bytes == 4096 * KV
    limit = limit_of(work, H200)
    assert (limit.matmul_bound, limit.attention_bound) == (FLOPS, FLOPS)
    assert limit.seconds == pytest.approx((work.matmul_flops + work.attention_flops) / 790e12)


def test_what_bounds_each_part():
    limit = limit_of(Work(100, 10, 10, 100), Ceilings(10.0, 10.0))
    assert (limit.matmul_s, limit.attention_s, limit.seconds) == (10.0, 10.0, 20.0)
    assert (limit.matmul_bound, limit.attention_bound) == (BYTES, FLOPS)
    text = limit_of(Work(15e9, 2e12, 0, 0), H200).arithmetic(H200)
    assert text.startswith("matmuls 15 GB, 2 TFLOP: 3.488 ms by bytes")


def test_a_run_of_fixed_lengths():
    size = ModelSize.of(LLAMA_8B)
    run = run_limit(size, [(1000, 201)] * 512, H200, at_once=256)
    assert run.decode_steps == 400
    one = limit_of(decode_work(size, 256, 1000 + (1 + 200) / 2), H200)
    assert run.decode.seconds == pytest.approx(400 * one.seconds, rel=1e-9)
    prompts = limit_of(prefill_work(size, [1000] * 512), H200)
    assert run.seconds == pytest.approx(prompts.seconds + 400 * one.seconds, rel=1e-9)


def test_a_run_takes_as_long_as_its_longest_answer_and_its_last_arrival():
    size = ModelSize.of(LLAMA_8B)
    run = run_limit(size, [(10, 1), (10, 101)], H200, at_once=256)
    assert run.decode_steps == 100
    assert run.decode.matmul_s == pytest.approx(100 * 2 * PARAMS / 4.3e12)
    late = run_limit(size, [(10, 2)], H200, at_once=1, last_arrival_s=7.5)
    assert late.seconds == 7.5


def test_cached_tokens_are_not_computed():
    size = ModelSize.of(LLAMA_8B)
    whole, half = (run_limit(size, [(4096, 1)] * 4, H200, at_once=4, cached_tokens=n) for n in (0, 8192))
    assert half.prefill.seconds == pytest.approx(whole.prefill.seconds / 2)
    assert (whole.decode_steps, whole.decode.seconds) == (0, 0)


def test_data_shards_share_a_run():
    size = ModelSize.of(LLAMA_8B)
    one, two = (run_limit(size, [(4096, 129)] * 1024, H200, at_once=512, shards=n) for n in (1, 2))
    assert two.prefill.seconds == pytest.approx(one.prefill.seconds / 2)
    assert two.decode.attention_s == pytest.approx(one.decode.attention_s / 2)
    # 512 rows are bound by FLOPs, 256 on each shard still are.
    assert two.decode.matmul_s == pytest.approx(one.decode.matmul_s / 2)
