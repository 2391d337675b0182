"""On NVIDIA GPUs: the same contract as on CPU, with the kernels that run there, and the compiled steps."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_reference import MODELS, distance, logits, make_model, rounded, save
from jax.experimental import topologies

from sharded_llama.attention import attend, choose_backend, grouped_query_attn, paged_attn_reference
from sharded_llama.attention.paged_gpu import paged_attn_gpu
from sharded_llama.checkpoint import load_weights, open_checkpoint
from sharded_llama.config import LlamaConfig
from sharded_llama.engine.llm import LLM
from sharded_llama.engine.options import EngineOptions, sizes_of
from sharded_llama.engine.runner import Runner
from sharded_llama.kv_cache import EIGHT_BIT, PAGE_SIZE, KVPages, page_bytes
from sharded_llama.layers import dot
from sharded_llama.mesh import make_mesh
from sharded_llama.model import xfmr, xfmr_step
from sharded_llama.parity.compare import compare
from sharded_llama.parity.paged_rows import PagedRows
from sharded_llama.parity.results import ISOLATED
from sharded_llama.parity.torch_reference import TorchReference
from sharded_llama.parity.transformers_model import open_transformers
from sharded_llama.weights import abstract_weights

BATCH, LENGTH = 6, 37
WIDE = {"hidden_size": 256, "intermediate_size": 700, "vocab_size": 1031, "max_position_embeddings": 256}
# Few shapes to compile, and a pool that leaves room for other engines.
SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 72, "num_pages": 512, "progress": False}
TYPES = ("float32", "bfloat16", "float16")
PAGED_SHAPES = [  # rows, queries of each, heads, kv heads, width, pages of each
    (5, 1, 8, 2, 128, 40),
    (1, 1, 7, 1, 40, 300),
    (3, 16, 12, 3, 64, 9),
    (2, 33, 8, 8, 80, 5),
    (3, 5, 6, 2, 256, 7),
]
SHAPES = {
    "heads_of_64": {**WIDE, "head_dim": 64, "num_key_value_heads": 2},
    "heads_of_128_ungrouped": {**WIDE, "head_dim": 128, "num_key_value_heads": 8},
    "heads_of_16": {
        **WIDE,
        "head_dim": 16,
        "num_key_value_heads": 4,
        "rope_parameters": MODELS["grouped_llama3"]["rope_parameters"],
    },
}


@functools.cache
def reference(name):
    # Smaller weights than on CPU: the model is wider, and its logits should still have a margin to speak of.
    return make_model("grouped", **SHAPES[name], initializer_range=0.06)


def tokens():
    return np.random.default_rng(1).integers(3, 1031, (BATCH, LENGTH)).astype(np.int32)


def our_logits(folder, dtype, mesh, *, cached):
    config = LlamaConfig.from_hf(folder, dtype=dtype)
    weights = load_weights(open_checkpoint(folder), config, mesh=mesh, progress=False)
    if not cached:
        out = jax.jit(lambda w, t: xfmr(w, config, t, mesh=mesh))(weights, tokens())
    else:  # a chunk of two rows, another that continues it within a page, then token by token
        run = functools.partial(xfmr_step, mesh=mesh, all_logits=True)
        step = jax.jit(run, static_argnames=("config", "n_single"), donate_argnames="pages")
        paged = PagedRows.new(mesh, BATCH, LENGTH)
        pages, pieces = KVPages.new(config, mesh, paged.n_pages), []
        for start, end in ((0, 17), (17, 22), *((i, i + 1) for i in range(22, LENGTH))):
            rows, n_single, width = paged.step(tokens()[:, start:end], np.full(BATCH, start), mesh)
            out, pages = step(weights, config=config, rows=rows, pages=pages, n_single=n_single)
            pieces.append(np.asarray(out).reshape(BATCH, width, -1)[:, : end - start])
        out = np.concatenate(pieces, axis=1)
    return np.asarray(out, np.float64)[..., : config.vocab_size]


def check_contract(name, dtype, folder, mesh):
    model = reference(name)
    exact_dtype = "float64" if dtype == "float32" else "float32"
    exact, theirs = (logits(rounded(model, dtype), tokens(), d) for d in (exact_dtype, dtype))
    save(model, folder, dtype)
    for cached in (False, True):
        ours = our_logits(folder, dtype, mesh, cached=cached)
        if dtype == "float32":
            assert distance(ours, theirs) < max(1e-5, 1.5 * distance(theirs, exact)), cached
        else:
            assert distance(ours, exact) < 1.25 * distance(theirs, exact), cached


def check_components(name, dtype, folder, mesh):
    """Every component, the logits and the greedy text of a whole comparison."""
    save(reference(name), folder, "float32" if dtype == "float64" else dtype)
    with jax.enable_x64(dtype == "float64"):
        llm = LLM(folder, mesh=mesh, dtype=dtype, skip_tokenizer=True, progress=False)
        report = compare(llm, TorchReference(open_transformers(folder, dtype)), tokens(), chunk=16)
    assert report.passed, report.first_failure
    return {row.component for row in report.rows if row.mode == ISOLATED and row.difference.bit_equal < 1}


@pytest.mark.gpu
class TestOneGpu:
    @pytest.mark.parametrize(
        ("name", "dtype"),
        [*itertools.product(SHAPES, ["float32", "bfloat16"]), ("heads_of_64", "float16"), ("heads_of_16", "float64")],
    )
    def test_every_component(self, name, dtype, tmp_path):
        different = check_components(name, dtype, tmp_path, make_mesh())
        assert different.isdisjoint({"embedding", "attn_residual", "ffn_residual", "k_cache", "v_cache"})

    @pytest.mark.parametrize(
        ("name", "dtype"), [*itertools.product(SHAPES, ["float32", "bfloat16"]), ("heads_of_64", "float16")]
    )
    def test_logits(self, name, dtype, tmp_path):
        check_contract(name, dtype, tmp_path, make_mesh())

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    @pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 8, 64), (8, 2, 128), (7, 1, 40), (12, 3, 256)])
    def test_whole_sequences(self, heads, kv_heads, width, dtype):
        """Odd lengths and head counts: as near to float32 as plain JAX in the same type. cuDNN up to 128 wide."""
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (
            jax.random.normal(key, (3, 45, n, width), jnp.float32).astype(dtype)
            for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=True)
        )
        positions = jnp.broadcast_to(jnp.arange(45), (3, 45))
        exact = grouped_query_attn(*(x.astype(jnp.float32) for x in (q, k, v)), positions)
        whole = {backend: jax.jit(functools.partial(attend, backend)) for backend in ("gpu", "reference")}
        assert ("__cudnn$fmha" in whole["gpu"].lower(q, k, v).compile().as_text()) == (width <= 128)
        ours, plain = (run(q, k, v).astype(jnp.float32) for run in whole.values())
        assert distance(ours, exact) < 1.5 * distance(plain, exact)

    @pytest.mark.parametrize(
        ("shape", "dtype", "kv_dtype"),
        [
            *((PAGED_SHAPES[0], *types) for types in itertools.product(TYPES, (*TYPES, *EIGHT_BIT))),
            *((shape, dtype, dtype) for shape, dtype in itertools.product(PAGED_SHAPES[1:], TYPES)),
        ],
        ids=str,
    )
    def test_paged_attention(self, shape, dtype, kv_dtype):
        """No farther from float32, with the same stored values, than the specification is in that type."""
        q, pages, tables, start, _ = paged_inputs(*shape, dtype, kv_dtype)
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(paged_attn_reference)(q.astype(jnp.float32), pages, tables, start)
        ours = jax.jit(paged_attn_gpu)(q, pages, tables, start)
        assert ours.dtype == dtype
        if dtype == "float32":
            assert distance(ours, exact) < 1e-6
        else:
            plain = jax.jit(paged_attn_reference)(q, pages, tables, start)
            assert distance(ours.astype(jnp.float32), exact) < 1.25 * distance(plain.astype(jnp.float32), exact)
        again = jax.jit(paged_attn_gpu)(q, pages, tables, start)
        np.testing.assert_array_equal(np.asarray(again, np.float32), np.asarray(ours, np.float32))

    @pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
    @pytest.mark.parametrize("length", [1, 16])
    def test_what_is_not_visible_changes_no_bit(self, length, kv_dtype):
        q, pages, tables, start, seen = paged_inputs(3, length, 8, 2, 64, 40, "bfloat16", kv_dtype)
        clean = np.asarray(jax.jit(paged_attn_gpu)(q, pages, tables, start), np.float32)
        assert np.isfinite(clean).all()
        kv = jnp.where(seen[..., None, None], pages.kv_NPGK, jnp.asarray(jnp.nan, pages.kv_NPGK.dtype))
        scale = None if pages.scale_NPG is None else jnp.where(seen[..., None], pages.scale_NPG, jnp.nan)
        spoiled = jax.jit(paged_attn_gpu)(q, KVPages(kv, scale), tables, start)
        np.testing.assert_array_equal(np.asarray(spoiled, np.float32), clean)

    @pytest.mark.parametrize("terms", [4096, 11008, 14336])
    @pytest.mark.parametrize("rows", [1, 48, 4096])
    def test_float32_sums_of_real_widths_are_within_the_leaf_bound(self, rows, terms):
        rng = np.random.default_rng(0)
        x, w = (rng.standard_normal((n, terms), np.float32) for n in (rows, 4096))
        ours = jax.jit(functools.partial(dot, "...f,df->...d"))(x, w)
        exact = x[:48].astype(np.float64) @ w.astype(np.float64).T
        assert distance(ours[:48], exact) < 0.5e-6

    @pytest.mark.parametrize("options", [{}, {"decode_steps": 4}, {"deterministic": True}], ids=str)
    def test_greedy_text_in_float32_is_that_of_transformers(self, options, tmp_path):
        model = reference("heads_of_64")
        llm = LLM(save(model, tmp_path), mesh=make_mesh(), skip_tokenizer=True, **SMALL | options)
        rng = np.random.default_rng(2)
        prompts = [[1, *rng.integers(3, 1031, n).tolist()] for n in (1, 30, 7, 64)]
        for prompt, answer in zip(prompts, greedy(llm, prompts, 48), strict=True):
            sequence = torch.tensor([prompt + list(answer)])
            theirs = model(sequence).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
            assert list(answer) == theirs

    def test_greedy_text_in_bfloat16_where_the_margin_exceeds_the_noise(self, tmp_path):
        model = reference("heads_of_64")
        llm = LLM(save(model, tmp_path, "bfloat16"), skip_tokenizer=True, mesh=make_mesh(), **SMALL)
        prompts = [[1, 7, 9], list(range(3, 60))]
        compared = 0
        for prompt, answer in zip(prompts, greedy(llm, prompts, 64), strict=True):
            sequence = np.array([prompt + list(answer)])
            weights = rounded(model, "bfloat16")
            exact, noisy = (logits(weights, sequence, d)[0, len(prompt) - 1 : -1] for d in ("float32", "bfloat16"))
            noise = np.abs(noisy - exact).max(-1)
            top2 = np.sort(exact, axis=-1)[:, -2:]
            clear = top2[:, 1] - top2[:, 0] > 2 * 1.25 * noise
            compared += clear.sum()
            np.testing.assert_array_equal(np.array(answer)[clear], exact.argmax(-1)[clear])
        assert compared > 20

    @pytest.mark.parametrize("kv_dtype", ["auto", *EIGHT_BIT])
    def test_pages_are_updated_in_place_and_never_copied(self, kv_dtype):
        temporaries = []
        for n_pages in (1024, 8192):
            runner = make_runner(make_mesh(), n_pages, kv_dtype)
            assert runner.backend == "gpu"
            expected = n_pages * page_bytes(runner.config, runner.mesh, kv_dtype)
            steps = [runner._forward(shape) for shape in runner.sizes.shapes] + [runner._copy_pages()]
            memory = [step.memory_analysis() for step in steps]
            assert {m.alias_size_in_bytes for m in memory} == {expected}
            temporaries.append([m.temp_size_in_bytes for m in memory])
        for few, many in zip(*temporaries, strict=True):
            assert many <= few + 2**20

    @pytest.mark.parametrize("attention", ["gpu", "blockwise"])
    @pytest.mark.parametrize("kv_dtype", ["auto", "float8_e4m3fn"])
    def test_a_second_run_compiles_nothing_and_repeats_the_first(self, attention, kv_dtype):
        config = LlamaConfig.from_dict({**LLAMA, "n_layers": 2})
        # Without cached prefixes: these would make other chunks of the second run's prompts.
        options = {**SMALL, "kv_cache_dtype": kv_dtype, "enable_prefix_caching": False}
        llm = LLM.random(config, make_mesh(), attention=attention, **options)
        prompts = [[i, 2, 3] for i in range(4)] + [[i] * 50 for i in range(4)]
        first = greedy(llm, prompts, 300)
        n_compiled = llm.engine.runner.n_compiled
        assert greedy(llm, prompts, 300) == first
        assert llm.engine.runner.n_compiled == n_compiled

    @pytest.mark.parametrize(("kv_dtype", "bound"), [("int8", 0.005), ("float8_e4m3fn", 0.02)])
    def test_logits_through_an_8_bit_cache(self, kv_dtype, bound, tmp_path):
        """A prompt attends to what the cache holds of it, too: the log-probabilities of its most likely next tokens are
        near to those of the model's own type. The bounds are twice what a CPU gives, where the rounding is the same."""
        folder = save(reference("heads_of_64"), tmp_path)
        prompts, values = [[1, *range(3, 60)], [7] * 20 + [9]], []
        for of in ("auto", kv_dtype):
            llm = LLM(folder, mesh=make_mesh(), skip_tokenizer=True, kv_cache_dtype=of, **SMALL)
            answers = llm.generate(prompts, max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=20)
            values.append([{t: p.logprob for t, p in a.outputs[0].logprobs[0].items()} for a in answers])
            llm.shutdown()
        for exact, rounded_values in zip(*values, strict=True):
            shared = sorted(set(exact) & set(rounded_values))
            assert len(shared) >= 15
            assert distance([rounded_values[t] for t in shared], [exact[t] for t in shared]) < bound

    def test_two_all_reduces_per_layer_on_two_gpus(self):
        """Of hidden states, and one for the embedding; beside these only each row's peak and sum.

        The compiler is told of a host with two GPUs; this one need not have them.
        """
        devices = topologies.get_topology_desc("", "cuda", topology="1x1x2").devices
        runner = make_runner(make_mesh(1, 2, devices=devices), 1024)
        for shape in runner.sizes.shapes:
            text = runner._forward(shape).as_text()
            hidden, others = 0, 0
            for shapes in re.findall(r"= (.+?) all-reduce(?:-start)?\(", text):
                # An asynchronous one may name its operand beside its result, and several may be combined into one.
                sizes = {size for size in re.findall(r"\[([\d,]*)\]", shapes)}
                of_hidden = [size for size in sizes if str(runner.config.dim) in size.split(",")]
                hidden, others = hidden + bool(of_hidden), others + (not of_hidden)
            assert hidden == 2 * runner.config.n_layers + 1
            assert others <= 2
            assert not re.search(r"all-gather|all-to-all|collective-permute|reduce-scatter", text)


def greedy(llm, prompts, n_tokens):
    """The tokens of each answer."""
    answers = llm.generate(prompts, max_tokens=n_tokens, temperature=0.0, ignore_eos=True)
    return [answer.outputs[0].token_ids for answer in answers]


def paged_inputs(batch, length, heads, kv_heads, width, n_table, dtype, kv_dtype):
    """Rows of different lengths in scattered pages, and which places (N, P) they see. Numbers after a row's last page
    are beyond the pool."""
    rng = np.random.default_rng(0)
    n_pages, cached = batch * n_table + 2, n_table * PAGE_SIZE
    q = jnp.asarray(rng.standard_normal((batch, length, heads, width)), dtype)
    start = rng.integers(0, cached - length + 1, batch)
    start[0] = cached - length
    tables = rng.permutation(n_pages)[: batch * n_table].reshape(batch, n_table)
    position = np.arange(cached)
    at = tables[:, position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
    seen = np.zeros(n_pages * PAGE_SIZE, bool)
    seen[at[position <= start[:, None] + length - 1]] = True
    for row, last in enumerate((start + length - 1) // PAGE_SIZE):
        tables[row, last + 1 :] = rng.integers(n_pages, 2**31 - 1, n_table - last - 1)
    shape = (n_pages, PAGE_SIZE, 2 * kv_heads, width)
    empty = KVPages(jnp.zeros(shape, kv_dtype), jnp.zeros(shape[:-1], jnp.float32) if kv_dtype in EIGHT_BIT else None)
    k, v = (jnp.asarray(rng.standard_normal((n_pages * PAGE_SIZE, kv_heads, width)), dtype) for _ in range(2))
    pages = jax.jit(KVPages.write)(empty, k, v, jnp.arange(n_pages * PAGE_SIZE))
    return q, pages, jnp.asarray(tables, jnp.int32), jnp.asarray(start, jnp.int32), seen.reshape(n_pages, PAGE_SIZE)


def make_runner(mesh, n_pages, kv_dtype="auto"):
    config, data = LlamaConfig.from_dict(LLAMA), mesh.shape["data"]
    options = EngineOptions(max_num_seqs=8 * data, max_num_batched_tokens=264 * data)
    return Runner(
        config,
        mesh,
        abstract_weights(config, mesh),
        backend=choose_backend(config, mesh.devices.flat[0]),
        sizes=sizes_of(options, mesh),
        n_pages=n_pages,
        table_width=128,
        kv_dtype=kv_dtype,
    )


LLAMA = {
    "dim": 1024,
    "n_layers": 3,
    "n_heads": 8,
    "n_kv_heads": 4,
    "head_dim": 128,
    "ffn_dim": 2048,
    "vocab_size": 4096,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
    "dtype": "bfloat16",
}


@pytest.mark.gpu2
class TestTwoGpus:
    @pytest.mark.parametrize("mesh_shape", [(1, 2), (2, 1)], ids=str)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_logits(self, dtype, mesh_shape, tmp_path):
        check_contract("heads_of_64", dtype, tmp_path, make_mesh(*mesh_shape))

    @pytest.mark.parametrize("mesh_shape", [(1, 2), (2, 1)], ids=str)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_every_component(self, dtype, mesh_shape, tmp_path):
        check_components("heads_of_64", dtype, tmp_path, make_mesh(*mesh_shape))

    def test_greedy_text_equals_one_gpu_in_float32(self, tmp_path):
        folder = save(reference("heads_of_64"), tmp_path)
        prompts = [[1, 7, 9], list(range(3, 60)), [5]]
        texts = []
        for shape in ((1, 1), (1, 2), (2, 1)):
            sizes = {name: shape[0] * SMALL[name] for name in ("max_num_seqs", "max_num_batched_tokens")}
            llm = LLM(folder, mesh=make_mesh(*shape), skip_tokenizer=True, **SMALL | sizes)
            texts.append(greedy(llm, prompts, 64))
            llm.shutdown()
        assert texts[0] == texts[1] == texts[2]
