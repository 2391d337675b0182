"""The fused kernels, compiled for the GPU, against plain JAX; and the engine on top of them, compared, and run long."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_reference import distance, make_model, save
from jax.sharding import PartitionSpec as P

from sharded_llama.attention.metrics import attention_metrics
from sharded_llama.attention.paged import paged_attn_reference
from sharded_llama.attention.paged_gpu import paged_rows_gpu
from sharded_llama.attention.scores_gpu import paged_scores
from sharded_llama.config import LlamaConfig
from sharded_llama.engine.llm import LLM
from sharded_llama.fused import swiglu as swiglu_kernel
from sharded_llama.fused.add_norm import add_norm, add_norm_reference
from sharded_llama.fused.rotate_write import rotate_write, rotate_write_reference
from sharded_llama.kv_cache import PAGE_SIZE, KVPages
from sharded_llama.layers import rope_angles, swiglu
from sharded_llama.mesh import hopper_processors, make_mesh
from sharded_llama.sampling import SamplingParams

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parent.parent.parent
TYPES = ("float32", "bfloat16", "float16")
SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 72, "num_pages": 512, "progress": False}
STEPS = 30_000  # of the engine that runs for long
SPARE = 32 << 20  # bytes by which a process may grow while it serves


def plain(dtype):
    """Within the rounding of one value of a type."""
    return {"rtol": 1e-6 if dtype == "float32" else 2 * float(jnp.finfo(dtype).eps), "atol": 1e-6}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n_rows", "width"), [(1, 4096), (5, 96), (17, 5120), (300, 16384), (2064, 8192)])
def test_add_norm(dtype, n_rows, width):
    keys = jax.random.split(jax.random.key(0), 3)
    h, x = (jax.random.normal(key, (n_rows, width), dtype) for key in keys[:2])
    weight = jax.random.normal(keys[2], (width,), dtype)
    ours = jax.jit(add_norm, static_argnums=3)(h, x, weight, 1e-5)
    theirs = jax.jit(add_norm_reference, static_argnums=3)(h, x, weight, 1e-5)
    np.testing.assert_array_equal(np.float32(ours[0]), np.float32(theirs[0]))
    np.testing.assert_allclose(np.float32(ours[1]), np.float32(theirs[1]), **plain(dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("rows", "columns", "terms"),
    [(72, 96, 64), (256, 14336, 4096), (336, 224, 320), (2032, 14336, 4096), (2304, 896, 5120)],
)
def test_swiglu(dtype, rows, columns, terms):
    """All widths of tiles, rows that do not fill one, sums shorter than the ring, and processors without a tile."""
    processors = hopper_processors(jax.devices()[0])
    if not processors:
        pytest.skip("the kernel is for the Hopper generation")
    x = jax.random.normal(jax.random.key(0), (rows, terms), dtype)
    w13 = jax.random.normal(jax.random.key(1), (2, columns, terms), dtype) * terms**-0.5
    assert swiglu_kernel.fits(x, w13)
    kernel = functools.partial(swiglu_kernel.swiglu_gpu, processors=processors)
    ours, theirs = (np.float32(jax.jit(f)(x, w13)) for f in (kernel, swiglu))
    np.testing.assert_allclose(ours, theirs, rtol=4 * float(jnp.finfo(dtype).eps), atol=1e-4)
    assert np.mean(ours != theirs) < 0.02


NEW_PROCESS = """
import json
from sharded_llama.config import LlamaConfig
from sharded_llama.engine.llm import LLM
from sharded_llama.mesh import make_mesh

heads = {"n_heads": 8, "n_kv_heads": 2, "head_dim": 64}
sizes = {"dim": 512, "n_layers": 2, "ffn_dim": 1024, "vocab_size": 1000, "norm_eps": 1e-5, "rope_theta": 1e4}
config = LlamaConfig(**heads, **sizes, dtype="bfloat16")
options = {"max_num_seqs": 72, "max_num_batched_tokens": 176, "num_pages": 1024}
llm = LLM.random(config, make_mesh(), progress=False, **options)
llm.start()
prompts = [list(range(i + 1, i + 70)) for i in range(72)]
answers = [output.outputs[0].token_ids for output in llm.generate(prompts, max_tokens=4, ignore_eos=True)]
print(json.dumps([answers, llm.phases.n_compiled, llm.phases.n_cached]))
"""


def test_a_new_process_runs_what_is_on_the_disk(tmp_path):
    """Without tracing, by which kernels would have been imported; of more than 64 rows, for which there is one more."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    found = []
    for _ in range(2):
        command = [sys.executable, "-c", NEW_PROCESS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    (first, compiled, _), (second, again, cached) = found
    assert first == second
    assert compiled == again == cached


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("n_tokens", "kv_heads", "group", "width"), [(1, 8, 4, 128), (7, 3, 1, 64), (256, 1, 5, 48), (2064, 2, 8, 80)]
)
def test_rotate_write(dtype, n_tokens, kv_heads, group, width):
    heads = {"n_heads": kv_heads * group, "n_kv_heads": kv_heads, "head_dim": width}
    config = LlamaConfig(dim=64, n_layers=1, ffn_dim=64, vocab_size=32, norm_eps=1e-5, rope_theta=1e4, **heads)
    n_pages = n_tokens // PAGE_SIZE + 2
    keys = jax.random.split(jax.random.key(0), 2)
    qkv = jax.random.normal(keys[0], (n_tokens, kv_heads, group + 2, width), dtype)
    pages = KVPages(jax.random.normal(keys[1], (n_pages, PAGE_SIZE, 2 * kv_heads, width), dtype))
    at = np.random.default_rng(0).permutation(n_pages * PAGE_SIZE)[:n_tokens].astype(np.int32)
    at[2::5] = 2**31 - 1
    args = qkv, *rope_angles(config, jnp.arange(n_tokens) * 3), pages, jnp.asarray(at)
    (q, ours), (expected, theirs) = (jax.jit(f)(*args) for f in (rotate_write, rotate_write_reference))
    np.testing.assert_allclose(np.float32(q), np.float32(expected), **plain(dtype))
    np.testing.assert_allclose(np.float32(ours.kv_NPGK), np.float32(theirs.kv_NPGK), **plain(dtype))


def scattered(n_rows, table, kv_heads, width, dtype):
    """Pages that rows of any length have all over the pool."""
    n_pages = n_rows * table + 3
    kv = jax.random.normal(jax.random.key(0), (n_pages, PAGE_SIZE, 2 * kv_heads, width), dtype)
    tables = np.random.default_rng(0).permutation(n_pages)[: n_rows * table].reshape(n_rows, table)
    return KVPages(kv), jnp.asarray(tables, jnp.int32)


@pytest.mark.parametrize("n_single", [0, 1, 9, 40])
@pytest.mark.parametrize("n_chunks", [0, 1, 6])
def test_rows_of_one_and_of_several_tokens(n_single, n_chunks):
    """Each kind is written beside the other, whether its positions are split between programs or not."""
    n_rows, length, heads, kv_heads, width, table = n_single + n_chunks, 16, 12, 3, 64, 30
    if not n_rows:
        return
    pages, tables = scattered(n_rows, table, kv_heads, width, "float32")
    n_tokens = n_single + n_chunks * length
    q = jax.random.normal(jax.random.key(1), (n_tokens, heads, width))
    start = jnp.asarray(np.random.default_rng(1).integers(0, table * PAGE_SIZE - length, n_rows), jnp.int32)
    ours = jax.jit(paged_rows_gpu, static_argnums=4)(q, pages, tables, start, n_single)
    parts = []
    if n_single:
        rows = q[:n_single, None], pages, tables[:n_single], start[:n_single]
        parts.append(paged_attn_reference(*rows)[:, 0])
    if n_chunks:
        chunks = q[n_single:].reshape(n_chunks, length, heads, width)
        parts.append(paged_attn_reference(chunks, pages, tables[n_single:], start[n_single:]).reshape(-1, heads, width))
    assert distance(ours, jnp.concatenate(parts)) < 1e-6


@pytest.mark.parametrize("dtype", TYPES)
def test_metrics_of_attention(dtype):
    """With the kernel's scores and with plain JAX's, of rows from empty ones to some beyond what is kept."""
    n_rows, table = 6, 200
    pages, tables = scattered(n_rows, table, 2, 128, dtype)
    q = jax.random.normal(jax.random.key(1), (n_rows, 8, 128), dtype)
    length = jnp.int32([0, 1, 37, 256, 257, table * PAGE_SIZE])

    def run(kernel):
        def metrics(*args):
            return attention_metrics(*args, kernel)

        sharded = jax.shard_map(metrics, mesh=make_mesh(1, 1), in_specs=P(), out_specs=P(), check_vma=False)
        return np.asarray(jax.jit(sharded)(q, pages, tables, length))

    np.testing.assert_allclose(run(paged_scores), run(None), rtol=2e-4, atol=2e-5)


def test_text_in_float32_is_that_of_the_cpu(tmp_path):
    """Greedy and sampled, with and without filters, of the same engine on both."""
    sizes = {"hidden_size": 256, "intermediate_size": 700, "vocab_size": 1031, "max_position_embeddings": 256}
    model = make_model("grouped", **sizes, initializer_range=0.06)
    folder = save(model, tmp_path)
    rng = np.random.default_rng(3)
    prompts = [[1, *rng.integers(3, 1031, n).tolist()] for n in (1, 30, 7, 64)]
    common = {"max_tokens": 40, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0.0, **common),
        SamplingParams(temperature=1.0, seed=1, **common),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=2, **common),
        SamplingParams(temperature=1.3, min_p=0.02, repetition_penalty=1.2, seed=3, **common),
    ]
    texts = []
    for device in (jax.devices("gpu")[0], jax.devices("cpu")[0]):
        llm = LLM(folder, mesh=make_mesh(1, 1, devices=[device]), skip_tokenizer=True, **SMALL)
        texts.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
        llm.shutdown()
    assert texts[0] == texts[1]


def test_a_long_run_with_arrivals_and_aborts():
    """No error, nothing compiled, no page lost, and no memory that grows."""
    heads = {"n_heads": 8, "n_kv_heads": 4, "head_dim": 64}
    config = LlamaConfig(
        dim=256, n_layers=2, ffn_dim=512, vocab_size=4096, norm_eps=1e-5, rope_theta=1e4, eos_ids=(), **heads
    )
    sizes = {"max_num_seqs": 32, "max_num_batched_tokens": 32 + 128, "num_pages": 600, "max_model_len": 400}
    llm = LLM.random(config, make_mesh(1, 1), progress=False, **sizes)
    llm.start()
    engine, rng, running = llm.engine, np.random.default_rng(0), {}
    kept, n_compiled, n_requests = {}, engine.stats().n_compiled, 0
    for n in range(STEPS):
        while len(running) < 40 and rng.random() < 0.4:
            prompt = rng.integers(0, config.vocab_size, rng.integers(1, 300)).tolist()
            params = SamplingParams(
                temperature=float(rng.integers(0, 2)), max_tokens=int(rng.integers(1, 100)), ignore_eos=True
            )
            engine.add_request(f"{n_requests}", prompt, params)
            running[f"{n_requests}"] = params.max_tokens
            n_requests += 1
        if running and rng.random() < 0.02:
            aborted = str(rng.choice(list(running)))
            engine.abort(aborted)
            del running[aborted]
        for delta in engine.step():
            assert not delta.error, delta.error
            if delta.finish_reason and delta.request_id in running:
                del running[delta.request_id]
        if n in (STEPS // 3, STEPS - 1):
            jax.block_until_ready(engine.runner.state)
            stats = engine.mesh.devices.flat[0].memory_stats()
            kept[n] = stats["bytes_in_use"], resident_bytes()
    assert n_requests > 1000
    assert engine.stats().n_compiled == n_compiled
    (device, host), (device_later, host_later) = kept.values()
    assert device_later <= device + 1e6  # what is on its way differs from step to step
    assert host_later < host + SPARE
    for request in running:
        engine.abort(request)
    while engine.has_unfinished:
        engine.step()
    assert engine.stats().scheduler.running == engine.stats().scheduler.waiting == 0


def resident_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS"))
