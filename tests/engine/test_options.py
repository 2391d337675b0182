"""Options of an engine: mistakes are named, sizes follow, and the memory's pages are counted; the end of an engine."""

import types

import jax
import numpy as np
import pytest

from sharded_llama.config import LlamaConfig
from sharded_llama.engine import memory
from sharded_llama.engine.engine import Engine
from sharded_llama.engine.llm import LLM
from sharded_llama.engine.memory import plan_pages
from sharded_llama.engine.options import (
    BLOCK,
    EngineOptions,
    check_options,
    modes_of,
    pages_per_sequence,
    sizes_of,
)
from sharded_llama.engine.steps import StepShape
from sharded_llama.errors import ConfigError, EngineError, RequestError
from sharded_llama.kv_cache import PAGE_SIZE, page_bytes
from sharded_llama.mesh import make_mesh
from sharded_llama.sampling import Mode, SamplingParams
from sharded_llama.weights import init_weights

CONFIG = LlamaConfig(
    dim=32,
    n_layers=3,
    n_heads=8,
    n_kv_heads=2,
    head_dim=6,
    ffn_dim=50,
    vocab_size=131,
    norm_eps=1e-5,
    rope_theta=1e4,
    dtype="float32",
    max_seq_len=100,
)
SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 40, "decode_steps": 1}
SHALLOW = CONFIG.replace(n_layers=1)  # for what is run
MESHES = [(1, 1), (2, 2), (1, 8), (4, 2), (8, 1)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def mesh_of(platform, data=1):
    """As much of a mesh as sizes are made from."""
    return types.SimpleNamespace(shape={"data": data}, devices=np.array([types.SimpleNamespace(platform=platform)]))


def pages(mesh_shape=(1, 1), config=CONFIG, **options):
    options = EngineOptions(**{**SMALL, "max_num_seqs": 8 * mesh_shape[0], "max_num_batched_tokens": None, **options})
    mesh = make_mesh(*mesh_shape)
    return plan_pages(config, mesh, "blockwise", options, sizes_of(options, mesh))


@pytest.fixture
def engine():
    mesh = make_mesh(1, 1)
    return Engine(
        SHALLOW, mesh, init_weights(jax.random.key(0), SHALLOW, mesh=mesh), EngineOptions(num_pages=9, **SMALL)
    )


class TestMistakes:
    @pytest.mark.parametrize(
        "name",
        ["max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_bytes", "num_pages", "decode_steps"],
    )
    @pytest.mark.parametrize("value", [0, -1, 1.5, True, "8", float("nan"), 1 << 70])
    def test_counts(self, name, value):
        with pytest.raises(ConfigError, match=rf"{name}=.* must be a whole number from 1 to \d+"):
            EngineOptions(**{name: value})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"memory_utilization": 0}, "memory_utilization=0 must be a number above 0 and at most 1"),
            ({"memory_utilization": 1.01}, "memory_utilization=1.01"),
            ({"memory_utilization": float("nan")}, "memory_utilization=nan"),
            ({"memory_utilization": True}, "memory_utilization=True"),
            ({"memory_utilization": "0.9"}, "memory_utilization='0.9'"),
            ({"seed": 1.0}, "seed=1.0 must be a whole number"),
            ({"seed": True}, "seed=True"),
            ({"enable_prefix_caching": "no"}, "enable_prefix_caching='no' must be True or False"),
            ({"deterministic": 1}, "deterministic=1 must be True or False"),
            ({"entropy_sampler": 1}, "entropy_sampler=1 must be True or False"),
            ({"entropy_sampler": None}, "entropy_sampler=None must be True or False"),
        ],
    )
    def test_other_values(self, options, message):
        with pytest.raises(ConfigError, match=message):
            EngineOptions(**options)

    def test_unknown_names(self):
        with pytest.raises(
            ConfigError, match="unknown engine option 'max_seqs'; there are: max_model_len, max_num_seqs"
        ):
            EngineOptions.make(max_seqs=3)
        with pytest.raises(ConfigError, match="unknown engine option 'block_size'"):
            LLM("demo", block_size=16, progress=False)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kv_cache_dtype": "int4"}, "kv_cache_dtype='int4' is not one of auto, bfloat16, float32"),
            ({"kv_cache_dtype": 8}, "kv_cache_dtype=8"),
            ({"max_model_len": 101}, "max_model_len=101 is beyond the context of 100 tokens"),
            ({"max_model_len": 1}, "max_model_len=1 has no room for a prompt and an answer"),
        ],
    )
    def test_against_the_model(self, options, message):
        with pytest.raises(ConfigError, match=message):
            check_options(EngineOptions(**options), CONFIG)
        mesh = make_mesh(1, 1)
        with pytest.raises(ConfigError, match=message):
            Engine(CONFIG, mesh, None, EngineOptions(**options))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_num_seqs": 8, "max_num_batched_tokens": 23}, "max_num_batched_tokens=23 .* give at least 24"),
            ({"max_num_batched_tokens": 31}, "max_num_seqs=16: .* give at least 32"),
            ({"deterministic": True, "decode_steps": 4}, "deterministic=True runs one step at a time"),
            ({"deterministic": True, "max_num_seqs": 8, "max_num_batched_tokens": 7}, "give at least 8"),
        ],
    )
    def test_contradictions(self, options, message):
        with pytest.raises(ConfigError, match=message):
            sizes_of(EngineOptions(**options), mesh_of("cpu"))

    def test_the_least_that_a_contradiction_names_is_enough(self):
        assert sizes_of(EngineOptions(max_num_seqs=8, max_num_batched_tokens=24), mesh_of("cpu")).max_blocks == 1
        sizes = sizes_of(EngineOptions(max_num_seqs=8, max_num_batched_tokens=8, deterministic=True), mesh_of("cpu"))
        assert sizes.shapes == (StepShape(8, 0, 1),)


class TestSizes:
    @pytest.mark.parametrize("data", [1, 2, 4])
    @pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
    @pytest.mark.parametrize("given", [{}, SMALL, {"max_num_seqs": 100, "max_num_batched_tokens": 1000}])
    def test_every_step_that_fits_has_a_shape(self, data, platform, given):
        if data > 1 and given == SMALL:
            given = {"max_num_seqs": 8, "max_num_batched_tokens": 160}
        sizes = sizes_of(EngineOptions(**given), mesh_of(platform, data))
        assert sizes.slots * data >= given.get("max_num_seqs", 1)
        assert sizes.block == {"gpu": 32}.get(platform, BLOCK)
        assert sizes.slots + sizes.block <= sizes.max_tokens
        for n_single in range(sizes.slots + 1):
            for n_blocks in range(sizes.max_blocks + 1):
                fitting = [s for s in sizes.shapes if s.n_single >= n_single and s.n_blocks >= n_blocks]
                shape = sizes.shape_for(n_single, n_blocks)
                assert shape in fitting
                assert shape.n_tokens == min(s.n_tokens for s in fitting)

    @pytest.mark.parametrize("platform", ["cpu", "gpu"])
    def test_steps_that_only_decode_have_no_chunks(self, platform):
        """Several steps are one dispatch only in these, however few tokens a step may have."""
        for slots in (1, 2, 15, 16, 17, 33, 64, 100, 300):
            for room in (32, 33, 48, 100):
                sizes = sizes_of(
                    EngineOptions(max_num_seqs=slots, max_num_batched_tokens=slots + room), mesh_of(platform)
                )
                for n in range(1, slots + 1):
                    shape = sizes.shape_for(n, 0, n)
                    assert (shape.n_blocks, shape.n_chosen) == (0, 0)
                    assert shape.n_single >= n

    @pytest.mark.parametrize("platform", ["cpu", "gpu"])
    def test_samplers_are_of_as_many_rows_as_decode_steps(self, platform):
        for given in ({}, {"max_num_seqs": 7}, {"max_num_seqs": 100}, {"max_num_seqs": 1000}):
            sizes = sizes_of(EngineOptions(**given), mesh_of(platform))
            of_decoding = {s.n_rows for s in sizes.shapes if not s.n_blocks}
            assert {s.n_logits for s in sizes.shapes} <= of_decoding
            for n_logits in range(1, sizes.slots + 1):
                assert sizes.shape_for(0, sizes.max_blocks, n_logits).n_logits >= n_logits

    def test_steps_of_prompts_have_as_many_tokens_beside_any_number_of_answers(self):
        sizes = sizes_of(EngineOptions(), mesh_of("gpu"))
        assert (sizes.max_tokens, sizes.beside_chunks) == (2048, (0, 16, 128, 256))
        for n in sizes.beside_chunks:
            n_blocks = (sizes.max_tokens - n) // sizes.block
            assert 2048 - sizes.block < sizes.shape_for(n, n_blocks).n_tokens <= 2048
        assert not sizes_of(EngineOptions(), mesh_of("cpu")).beside_chunks

    def test_defaults_are_of_each_data_shard(self):
        for data in (1, 2, 4):
            assert sizes_of(EngineOptions(), mesh_of("cpu", data)).slots == 16
            assert sizes_of(EngineOptions(), mesh_of("gpu", data)).slots == 256
            assert sizes_of(EngineOptions(max_num_seqs=9), mesh_of("gpu", data)).slots == -(-9 // data)

    def test_decode_steps(self):
        assert sizes_of(EngineOptions(), mesh_of("cpu")).decode_steps == 4
        assert sizes_of(EngineOptions(), mesh_of("gpu")).decode_steps == 1
        assert sizes_of(EngineOptions(decode_steps=7), mesh_of("gpu")).decode_steps == 7

    def test_deterministic_has_one_shape_for_everything(self):
        for data in (1, 2):
            options = EngineOptions(deterministic=True, max_num_seqs=8 * data, max_num_batched_tokens=24 * data)
            sizes = sizes_of(options, mesh_of("gpu", data))
            assert sizes.shapes == (StepShape(24, 0, 1),)
            assert (sizes.slots, sizes.block, sizes.max_blocks, sizes.max_tokens) == (8, 1, 24, 24)
            assert (sizes.decode_steps, sizes.shape_for(3, 0)) == (1, StepShape(24, 0, 1))

    def test_the_entropy_sampler_is_a_mode_more_and_changes_no_size(self):
        off, on = EngineOptions(), EngineOptions(entropy_sampler=True)
        assert modes_of(off) == (Mode.GREEDY, Mode.SAMPLE, Mode.LOGPROBS)
        assert modes_of(on) == tuple(Mode)
        assert sizes_of(off, mesh_of("cpu")) == sizes_of(on, mesh_of("cpu"))

    @pytest.mark.parametrize(("length", "n_pages"), [(1, 1), (16, 1), (17, 2), (32, 2), (100, 7)])
    def test_pages_per_sequence(self, length, n_pages):
        assert pages_per_sequence(length) == n_pages


class TestPages:
    @pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
    @pytest.mark.parametrize(
        ("kv_dtype", "of_head"), [("auto", 24), ("bfloat16", 12), ("int8", 10), ("float8_e4m3fn", 10)]
    )
    def test_bytes_of_a_page(self, mesh_shape, kv_dtype, of_head):
        """16 positions of a key and a value of 6 numbers in 3 layers; 8-bit ones have a scale of four bytes each."""
        heads = max(2, mesh_shape[1]) // mesh_shape[1]  # on each device; more devices than heads hold copies
        assert page_bytes(CONFIG, make_mesh(*mesh_shape), kv_dtype) == 3 * 16 * 2 * heads * of_head

    @pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
    def test_kv_cache_bytes_is_of_the_whole_mesh(self, mesh_shape):
        mesh = make_mesh(*mesh_shape)
        of_page = page_bytes(CONFIG, mesh, "auto")
        total = mesh.size * (of_page * 11 + of_page // 2)
        assert pages(mesh_shape, kv_cache_bytes=total) == (11, 100)
        assert pages(mesh_shape, kv_cache_bytes=mesh.size * of_page * 7) == (7, 100)

    def test_8_bit_pages_are_more(self):
        total = 3 * 16 * 2 * 2 * 24 * 20
        assert pages(kv_cache_bytes=total).n_pages == 20
        assert pages(kv_cache_bytes=total, kv_cache_dtype="bfloat16").n_pages == 40
        for kv_dtype in ("int8", "float8_e4m3fn"):
            assert pages(kv_cache_bytes=total, kv_cache_dtype=kv_dtype).n_pages == 48

    def test_no_more_than_the_slots_can_use_twice(self):
        assert pages().n_pages == pages(kv_cache_bytes=1 << 40).n_pages == 2 * 8 * 7
        assert pages(max_model_len=33, kv_cache_bytes=1 << 40).n_pages == 2 * 8 * 3
        assert pages(kv_cache_bytes=1 << 40, num_pages=300).n_pages == 300
        assert memory.CPU_BYTES // page_bytes(CONFIG, make_mesh(1, 1), "auto") > 2 * 8 * 7

    def test_the_longest_sequence_is_what_fits(self):
        assert pages(num_pages=3) == (3, 48)
        assert pages(num_pages=7) == (7, 100)
        assert pages(num_pages=3, max_model_len=48) == (3, 48)
        assert pages(num_pages=3, max_model_len=20) == (3, 20)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"num_pages": 3},
                "needs 4 pages of 16 tokens, but num_pages=3 holds 3: at most max_model_len=48 would fit",
            ),
            ({"kv_cache_bytes": 3 * 4608}, "kv_cache_bytes=13824 holds 3: at most max_model_len=48 would fit"),
        ],
    )
    def test_a_length_beyond_the_memory_says_what_would_fit(self, options, message):
        with pytest.raises(ConfigError, match=f"max_model_len=49 {message}" if "needs" in message else message):
            pages(max_model_len=49, **options)
        assert pages(max_model_len=48, **options) == (3, 48)

    @pytest.mark.parametrize("max_model_len", [None, 2])
    def test_a_pool_without_a_page(self, max_model_len):
        with pytest.raises(ConfigError, match=r"kv_cache_bytes=4607 holds 0.*give the cache more memory"):
            pages(kv_cache_bytes=4607, max_model_len=max_model_len)

    def test_the_engine_keeps_to_it(self, engine):
        assert engine.stats().scheduler.pages_total == 9
        assert engine.max_model_len == 100
        shape = (9, PAGE_SIZE, 2 * 2, 6)
        assert [layer.kv_NPGK.shape for layer in engine.runner.state.pages] == [shape]


class TestRequests:
    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ([], "the prompt has no tokens"),
            ([131], "token id 131 is outside the vocabulary of 131 tokens"),
            ([5, -1], "token id -1"),
            ([1 << 40], "token id 1099511627776"),
            ([5] * 100, "100 tokens, but max_model_len=100 .* shorten it to 99 tokens"),
            ([5] * 5000, "5000 tokens"),
            ([1.5], "whole numbers"),
            (["5"], "whole numbers"),
            ([None], "whole numbers"),
            ([[5]], "whole numbers"),
            (5, "whole numbers"),
        ],
    )
    def test_a_prompt_that_cannot_be_served(self, engine, prompt, message):
        with pytest.raises(RequestError, match=message):
            engine.add_request("a", prompt, GREEDY)
        assert not engine.has_unfinished
        engine.add_request("a", [5], GREEDY)  # the name is still free

    def test_numpy_prompts(self, engine):
        engine.add_request("a", np.array([5, 6], np.int32), GREEDY)
        assert engine._sequences["a"][0].prompt == [5, 6]

    def test_a_name_twice(self, engine):
        engine.add_request("a", [5], GREEDY)
        with pytest.raises(RequestError, match="request 'a' is being served already"):
            engine.add_request("a", [6], GREEDY)
        while engine.has_unfinished:
            engine.step()
        engine.add_request("a", [6], GREEDY)

    def test_a_name_again_right_after_its_abort(self, engine):
        """What is still to be said of the first is not taken for the second's."""
        engine.add_request("a", [5], GREEDY)
        engine.step()
        engine.abort("a")
        engine.add_request("a", [6, 7], GREEDY)
        deltas = []
        while engine.has_unfinished:
            deltas += engine.step()
        assert sum(len(delta.token_ids) for delta in deltas) == 8
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]

    def test_too_many(self, engine, monkeypatch):
        monkeypatch.setattr("sharded_llama.engine.engine.MAX_REQUESTS", 2)
        engine.add_request("a", [5], GREEDY)
        engine.add_request("b", [5], GREEDY)
        with pytest.raises(RequestError, match="2 requests are waiting already"):
            engine.add_request("c", [5], GREEDY)


class Burning:
    """A result that fails when it is read, as those of devices do."""

    def __array__(self, *_, **__):
        raise RuntimeError("the device is on fire\nand there is more to say")

    def copy_to_host_async(self):
        pass


class TestEnd:
    def test_after_shutdown(self, engine):
        engine.add_request("a", [5], GREEDY)
        engine.add_request("b", [5], GREEDY)
        engine.step()
        engine.abort("b")
        engine.shutdown()
        engine.shutdown()
        assert not engine.has_unfinished
        assert engine.runner.state is None
        with pytest.raises(EngineError, match="the engine is dead: it was shut down"):
            engine.add_request("c", [5], GREEDY)
        with pytest.raises(EngineError, match="the engine is dead: it was shut down"):
            engine.step()
        engine.abort("a")

    def test_llm_after_shutdown(self):
        llm = LLM.random(SHALLOW, make_mesh(1, 1), num_pages=9, progress=False, **SMALL)
        llm.generate([[5]], max_tokens=2)
        llm.shutdown()
        with pytest.raises(EngineError, match="shut down"):
            llm.generate([[5]])

    @pytest.mark.parametrize("when", ["queueing", "reading"])
    def test_a_failing_step_ends_every_request(self, engine, monkeypatch, when):
        execute = engine.runner.execute

        def failing(work):
            if when == "queueing":
                raise RuntimeError("the device is on fire\nand there is more to say")
            return type(execute(work))(*[Burning()] * 3, None, None)

        for name in "abc":
            engine.add_request(name, [5, 6], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, n=2))
        engine.add_request("short", [7], SamplingParams(temperature=0.0, max_tokens=1))
        while engine.is_unfinished("short"):
            engine.step()
        monkeypatch.setattr(engine.runner, "execute", failing)
        engine.abort("c")
        deltas = []
        while not any(delta.error for delta in deltas):
            deltas += engine.step()
        last = {(d.request_id, d.index): d for d in deltas if d.finish_reason}
        assert {key: d.finish_reason for key, d in last.items()} == {
            **{("c", i): "abort" for i in range(2)},
            **{(name, i): "error" for name in "ab" for i in range(2)},
        }
        errors = {d.error for d in last.values() if d.error}
        assert errors == {"a step failed with RuntimeError: the device is on fire"}
        assert not engine.has_unfinished
        for _ in range(2):
            with pytest.raises(
                EngineError, match=r"the engine is dead: a step failed with RuntimeError: .* on fire\.$"
            ):
                engine.step()
        with pytest.raises(EngineError, match="on fire"):
            engine.add_request("later", [5], GREEDY)

    def test_a_failing_step_reaches_the_caller_of_llm(self, monkeypatch):
        llm = LLM.random(SHALLOW, make_mesh(1, 1), num_pages=9, progress=False, **SMALL)

        def failing(_):
            raise MemoryError

        monkeypatch.setattr(llm.engine.runner, "execute", failing)
        with pytest.raises(EngineError, match="a step failed with MemoryError"):
            llm.generate([[5], [6]])
        with pytest.raises(EngineError, match="the engine is dead: a step failed with MemoryError"):
            llm.generate([[5]])
