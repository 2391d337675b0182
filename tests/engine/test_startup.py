"""Starting: steps are compiled while weights are read, errors of either come alone, and every second has a name."""

import functools
import gc
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import pytest
from hf_reference import make_model, save

from sharded_llama.checkpoint import open_checkpoint
from sharded_llama.engine import compilation, engine as engine_module, memory, runner as runner_module
from sharded_llama.engine.compilation import CACHE_HIT_EVENT, COMPILE_EVENT, CompileCounter, Phases
from sharded_llama.engine.engine import Engine
from sharded_llama.engine.llm import LLM
from sharded_llama.engine.loading import LOADING_THREAD, Loading, load_model, open_model
from sharded_llama.engine.memory import LOADING_BYTES, expected_in_use, plan_pages, rounded_down
from sharded_llama.engine.options import EngineOptions, sizes_of
from sharded_llama.engine.runner import Runner
from sharded_llama.errors import CheckpointError, ConfigError, EngineError, RequestError
from sharded_llama.mesh import make_mesh
from sharded_llama.sampling import Mode
from sharded_llama.sampling.structured import StructuredOutputs

SMALL = {"max_num_seqs": 2, "max_num_batched_tokens": 18, "decode_steps": 1, "progress": False}
PHASES = ["config", "memory plan", "compile", "waiting for weights", "pages"]
PATIENCE = 60  # seconds after which what never happens fails the test
PROMPT = [1, 5, 9, 30]


class Source:
    """A checkpoint whose reads call `before` first."""

    def __init__(self, source, before=lambda: None):
        self._source, self.before, self.n_reads = source, before, 0

    def __getattr__(self, name):
        return getattr(self._source, name)

    def read(self, name, slices, out):
        self.before()
        self.n_reads += 1
        return self._source.read(name, slices, out)


def waiting_for(event):
    def wait():
        assert event.wait(PATIENCE), "what reading waits for does not happen"

    return wait


def loading_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith(LOADING_THREAD)]


def tokens(llm):
    return llm.generate(PROMPT, max_tokens=6, temperature=0.0, ignore_eos=True)[0].outputs[0].token_ids


def same_weights(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(make_model("grouped", num_hidden_layers=1), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(folder):
    """The model as it is loaded while the caller waits, and the number of reads that it takes."""
    source = Source(open_checkpoint(folder))
    return load_model(source, mesh=make_mesh(1, 1), skip_tokenizer=True, progress=False), source.n_reads


@pytest.fixture(scope="module")
def loaded(whole):
    return whole[0]


@pytest.fixture(scope="module")
def n_reads(whole):
    return whole[1]


@pytest.fixture(scope="module")
def expected(loaded):
    """The answer of an engine that has its weights from the beginning, and compiles when it must."""
    return tokens(LLM(loaded, **SMALL))


@pytest.fixture
def source(folder):
    return Source(open_checkpoint(folder))


@pytest.fixture
def new_llm(source):
    return lambda **options: LLM(source, mesh=make_mesh(1, 1), skip_tokenizer=True, **SMALL | options)


@pytest.fixture
def compiling(monkeypatch):
    """An event that is set when the first step has been compiled. Few are compiled ahead."""
    seen, really = threading.Event(), Runner._compile

    def compile_one(runner, *args, **kwargs):
        compiled = really(runner, *args, **kwargs)
        seen.set()
        return compiled

    monkeypatch.setattr(Runner, "_compile", compile_one)
    monkeypatch.setattr(Runner, "_all_jobs", lambda self: [(self._set_tables,), (self._copy_pages,)])
    return seen


@pytest.fixture
def stopped(monkeypatch):
    """An event that is set when reading is stopped."""
    seen, really = threading.Event(), Loading.stop

    def stop(self):
        self._stopping.set()
        seen.set()
        really(self)

    monkeypatch.setattr(Loading, "stop", stop)
    return seen


class TestMeanwhile:
    def test_steps_are_compiled_while_weights_are_read(self, source, new_llm, compiling, expected, n_reads):
        source.before = waiting_for(compiling)
        llm = new_llm()
        assert not compiling.is_set()
        llm.start()
        assert source.n_reads == n_reads, "everything once"
        assert loading_threads() == []
        assert tokens(llm) == expected

    def test_an_engine_without_start(self, source, new_llm, expected, monkeypatch):
        """Its memory is planned meanwhile."""
        planned, really = threading.Event(), engine_module.plan_pages
        monkeypatch.setattr(engine_module, "plan_pages", lambda *a, **k: (really(*a, **k), planned.set())[0])
        source.before = waiting_for(planned)
        assert tokens(new_llm()) == expected

    def test_weights_without_an_engine(self, new_llm, loaded, source, n_reads):
        llm = new_llm()
        assert same_weights(llm.weights, loaded.weights)
        assert llm.weights is llm.weights
        assert (llm.draft, source.n_reads) == (None, n_reads)

    def test_a_second_start_does_nothing(self, source, new_llm, compiling, expected, n_reads):
        llm = new_llm()
        llm.start()
        engine, n_compiled = llm.engine, llm.phases.n_compiled
        llm.start()
        assert (llm.engine is engine, llm.phases.n_compiled, source.n_reads) == (True, n_compiled, n_reads)
        assert tokens(llm) == expected

    def test_a_draft_model_is_read_after_the_model(self, source, folder, new_llm, expected, n_reads):
        names = []
        source.before = lambda: names.append("model")
        draft = Source(open_checkpoint(folder), lambda: names.append("draft"))
        llm = new_llm(draft_model=draft, num_speculative_tokens=2)
        assert same_weights(llm.draft.weights, llm.weights)
        assert names == ["model"] * n_reads + ["draft"] * n_reads
        assert tokens(llm) == expected

    def test_the_callers_precision_counts(self, folder, loaded):
        """The setting is each thread's own."""
        with jax.enable_x64(True):
            wide = LLM(folder, mesh=make_mesh(1, 1), skip_tokenizer=True, dtype="float64", **SMALL)
            assert wide.weights.norm.dtype == np.float64
            assert np.array_equal(wide.weights.norm, np.asarray(loaded.weights.norm, np.float64))


class TestErrors:
    def test_of_reading_while_steps_are_compiled(self, source, new_llm, compiling):
        def fail():
            waiting_for(compiling)()
            raise CheckpointError("the disk is on fire")

        source.before = fail
        llm = new_llm()
        for ask in (llm.start, llm.start, lambda: llm.weights, lambda: tokens(llm)):
            with pytest.raises(CheckpointError, match=r"^the disk is on fire$") as caught:
                ask()
            assert caught.value.__cause__ is None
            assert loading_threads() == []

    def test_of_reading_end_the_compiling(self, new_llm, source, monkeypatch):
        """They are looked for after each step, not after the last."""
        llm, asked = new_llm(), []
        llm.engine.runner._compiled.clear()
        monkeypatch.setattr(Runner, "_compile", lambda self, key, *_, **__: asked.append(key))
        monkeypatch.setattr(runner_module, "_compiling", lambda: Sequential())

        def check():
            raise CheckpointError("the disk is on fire")

        with pytest.raises(CheckpointError, match="on fire"):
            llm.engine.compile(progress=False, check=check)
        assert len(asked) == 1

    def test_of_a_tensor_that_is_missing_come_at_once(self, folder):
        source = Source(open_checkpoint(folder))
        source.tensors = {name: info for name, info in source.tensors.items() if name != "norm"}
        with pytest.raises(CheckpointError, match=r"missing tensors: .*norm"):
            LLM(source, mesh=make_mesh(1, 1), skip_tokenizer=True, **SMALL)
        assert (source.n_reads, loading_threads()) == (0, [])

    @pytest.mark.parametrize("where", ["plan", "compile"])
    def test_of_the_engine_end_the_reading(
        self, source, new_llm, stopped, monkeypatch, where, loaded, expected, n_reads
    ):
        """What was not read is read when it is asked for."""
        source.before = waiting_for(stopped)
        llm = new_llm()
        with monkeypatch.context() as patch:
            if where == "plan":
                patch.setattr(engine_module, "plan_pages", failing(ConfigError("too small")))
            else:
                patch.setattr(Engine, "compile", failing(ConfigError("too small")))
            with pytest.raises(ConfigError, match=r"^too small$"):
                llm.start()
        assert loading_threads() == []
        assert source.n_reads < n_reads
        assert same_weights(llm.weights, loaded.weights)
        assert tokens(llm) == expected

    def test_too_little_memory(self, source, new_llm, stopped):
        source.before = waiting_for(stopped)
        llm = new_llm(kv_cache_bytes=4000, max_model_len=60)
        with pytest.raises(ConfigError, match="max_model_len=60 needs 4 pages"):
            llm.start()
        assert loading_threads() == []

    def test_ctrl_c_while_waiting(self, source, new_llm, stopped, monkeypatch):
        source.before = waiting_for(stopped)
        llm = new_llm()
        future = llm._loading._loaded
        with monkeypatch.context() as patch:
            patch.setattr(future, "result", failing(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                _ = llm.weights
        assert loading_threads() == []

    def test_shutdown_while_weights_are_read(self, source, new_llm, stopped, loaded, n_reads):
        source.before = waiting_for(stopped)
        llm = new_llm()
        llm.shutdown()
        assert loading_threads() == []
        assert source.n_reads < n_reads
        assert same_weights(llm.weights, loaded.weights)

    def test_shutdown_of_an_engine_that_waits_for_weights(self, source, new_llm, stopped):
        source.before = waiting_for(stopped)
        llm = new_llm()
        llm._engine = llm._new_engine(ahead=False)
        llm.shutdown()
        assert loading_threads() == []
        with pytest.raises(EngineError, match="it was shut down"):
            tokens(llm)

    def test_what_is_stopped_says_so(self, folder):
        """To whoever is reading: the thread alone sees it."""
        seen = threading.Event()
        model = open_model(
            Source(open_checkpoint(folder), waiting_for(seen)), mesh=make_mesh(1, 1), skip_tokenizer=True
        )
        reading = Loading([model], progress=False)
        reading._stopping.set()
        seen.set()
        with pytest.raises(EngineError, match="reading the weights was stopped"):
            reading._loaded.result(PATIENCE)


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


class Sequential:
    """A pool that does one thing after the other, when what it gives is asked for."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        return types.SimpleNamespace(result=functools.partial(function, *args), cancel=lambda: None)


class TestPhases:
    def test_names_and_counts(self, new_llm, compiling, monkeypatch):
        said = []
        monkeypatch.setattr(compilation.logging, "info", lambda text, *args: said.append(text % args))
        llm = new_llm()
        assert list(llm.phases) == PHASES[:1]
        llm.start()
        assert list(llm.phases) == PHASES
        assert llm.phases.n_compiled == 2
        assert 0 <= llm.phases.n_cached <= 2
        assert llm.phases.weights_s > 0
        assert gc.isenabled()
        assert said[-1] == llm.phases.line()
        for name in PHASES:
            assert len([text for text in said if text.startswith(f"{name}: ")]) == 1

    def test_seconds_add_up(self, monkeypatch):
        ticks = iter([10.0, 11.5, 20.0, 22.0, 30.0, 30.25])
        monkeypatch.setattr(compilation, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
        phases = Phases()
        phases.weights_s, phases.n_compiled, phases.n_cached = 3.06, 32, 28
        for name in ("config", "compile", "config"):
            with phases.of(name):
                pass
        assert phases == {"config": 1.75, "compile": 2.0}
        assert phases.total_s == 3.75
        phases["waiting for weights"] = 1.0
        assert phases.line() == (
            "ready after 4.8 s: config 1.8, compile 2.0 (32 executables, 28 from the cache), "
            "waiting for weights 1.0 (read in 3.1 meanwhile)"
        )

    def test_what_fails_is_counted_too(self, monkeypatch):
        ticks = iter([1.0, 4.0])
        monkeypatch.setattr(compilation, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
        phases = Phases()
        with pytest.raises(ConfigError), phases.of("compile"):
            raise ConfigError("no")
        assert phases == {"compile": 3.0}

    def test_counters_know_whose_compilations_count(self):
        def compile_one(from_cache):
            if from_cache:
                jax.monitoring.record_event(CACHE_HIT_EVENT)
            jax.monitoring.record_event_duration_secs(COMPILE_EVENT, 1.0)

        with CompileCounter("compile") as some, CompileCounter() as every:
            for name, from_cache in [("compile_0", True), ("compile_1", False), ("reader_0", True)]:
                thread = threading.Thread(target=compile_one, args=[from_cache], name=name)
                thread.start()
                thread.join()
        compile_one(True)
        assert (some.count, some.cached) == (2, 1)
        assert (every.count, every.cached) == (3, 2)

    def test_what_is_measured_for_gpus_is_kept_beside_executables(self):
        compilation.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir
        assert "xla_gpu_per_fusion_autotune_cache_dir" in jax.config.jax_persistent_cache_enable_xla_caches


class TestPlan:
    @pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4), (1, 8)], ids=str)
    def test_bytes_of_weights_are_known_before_they_are_read(self, folder, mesh_shape):
        model = load_model(folder, mesh=make_mesh(*mesh_shape), skip_tokenizer=True, progress=False)
        leaves = jax.tree.leaves(model.weights)
        held = sum(leaf.addressable_shards[-1].data.nbytes for leaf in leaves)
        assert expected_in_use(model.mesh, [model.config]) == held
        assert expected_in_use(model.mesh, [model.config, model.config]) == 2 * held

    @pytest.mark.parametrize(
        ("n_pages", "rounded"), [(0, 0), (1, 1), (255, 255), (256, 256), (257, 256), (511, 510), (56_123, 56_064)]
    )
    def test_few_digits(self, n_pages, rounded):
        assert rounded_down(n_pages) == rounded

    def test_less_than_a_128th_is_lost(self):
        rng = np.random.default_rng(0)
        for n in rng.integers(1, 1 << rng.integers(1, 30, 2000)).tolist():
            assert n * 127 / 128 < rounded_down(n) <= n
            assert rounded_down(rounded_down(n)) == rounded_down(n)

    @pytest.mark.parametrize("in_use", [0, 4 << 30, (5 << 30) + LOADING_BYTES])
    def test_pages_do_not_depend_on_how_much_is_read_already(self, loaded, monkeypatch, in_use):
        expected = pages_on_accelerator(monkeypatch, loaded.config, 5 << 30)
        assert expected == (rounded_down(((18 << 30) - (5 << 30) - (11 << 20)) // (1 << 16)), 64)
        assert pages_on_accelerator(monkeypatch, loaded.config, in_use, expected_bytes=5 << 30) == expected

    def test_what_came_meanwhile_beside_weights_counts(self, loaded, monkeypatch):
        measured = pages_on_accelerator(monkeypatch, loaded.config, (9 << 30) + LOADING_BYTES, expected_bytes=5 << 30)
        assert measured == pages_on_accelerator(monkeypatch, loaded.config, 9 << 30)

    def test_what_takes_no_pages_is_compiled_for_all_numbers_of_layers(self, loaded, expected, monkeypatch):
        """It is compiled beside the trial for the memory plan, in an engine it is not compiled again."""
        for module in (memory, engine_module):
            monkeypatch.setattr(module, "modes_of", lambda _: (Mode.GREEDY,))
        config, mesh = loaded.config, loaded.mesh
        options = EngineOptions(**{k: v for k, v in SMALL.items() if k != "progress"})
        sizes = sizes_of(options, mesh)
        arguments = (config.replace(n_layers=2), mesh, "blockwise", options, sizes)
        made = {}
        assert memory._temporary_bytes(*arguments, True, made) == memory._temporary_bytes(*arguments)
        llm = LLM(loaded, **SMALL)
        ahead = {
            key for key in keys_of_all(llm.engine.runner, monkeypatch) if key[0] not in {"forward", "decode_several"}
        }
        assert set(made) == ahead - {("set_tables",), ("copy_pages",)} | {("new_slots",)}

        def plan(*args, executables, **kwargs):
            executables |= made
            return plan_pages(*args, **kwargs)

        monkeypatch.setattr(engine_module, "plan_pages", plan)
        again = LLM(loaded, **SMALL)
        assert again.engine.runner._compiled == made
        assert tokens(again) == expected
        assert {key[0] for key in set(again.engine.runner._compiled) - set(made)} <= {
            "forward",
            "set_tables",
            "copy_pages",
        }


def keys_of_all(runner, monkeypatch):
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_compile", lambda key, *_, **__: asked.append(key))
        runner.compile_all(progress=False)
    return asked


def pages_on_accelerator(monkeypatch, config, in_use, **kwargs):
    """The plan for a device of 20 GiB of which 18 may be used, with 10 MiB of temporaries and pages of 64 KiB."""
    stats = {"bytes_limit": 20 << 30, "bytes_in_use": in_use}
    device = types.SimpleNamespace(platform="tpu", memory_stats=lambda: stats)
    mesh = types.SimpleNamespace(
        local_devices=[device], devices=np.array([device]), shape={"data": 1, "model": 1}, size=1
    )
    options = EngineOptions(memory_utilization=0.9)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "page_bytes", lambda *_: 1 << 16)
        patch.setattr(memory, "_temporary_bytes", lambda *_: 10 << 20)
        return plan_pages(config, mesh, "blockwise", options, sizes_of(options, make_mesh(1, 1)), **kwargs)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([1] * 10_000, {}, "10000 tokens"),
        ([1, 2], {"structured_outputs": StructuredOutputs(regex="(")}, "needs a tokenizer"),
    ],
)
def test_requests_are_refused_while_weights_are_read(source, new_llm, prompt, settings, message):
    seen = threading.Event()
    source.before = waiting_for(seen)
    llm = new_llm()
    try:
        with pytest.raises(RequestError, match=message):
            llm.stream([prompt], **settings)
        assert source.n_reads == 0
    finally:
        seen.set()
        llm.shutdown()


def test_a_program_that_ends_does_not_wait_for_weights(tmp_path):
    """Its last error is all that is left to say; what was to be read is left."""
    folder = save(make_model("grouped", num_hidden_layers=12), tmp_path / "model")
    program = f"""
import threading, time
from sharded_llama.checkpoint import open_checkpoint
from sharded_llama.engine.llm import LLM

class Slow:
    def __init__(self, source):
        self.source, self.begun = source, threading.Event()

    def __getattr__(self, name):
        return getattr(self.source, name)

    def read(self, name, slices, out):
        with open({str(tmp_path / "reads")!r}, "a") as file:
            file.write(name + " ")
        self.begun.set()
        time.sleep(1)
        return self.source.read(name, slices, out)

source = Slow(open_checkpoint({str(folder)!r}))
llm = LLM(source, skip_tokenizer=True, progress=False)
source.begun.wait()
raise SystemExit("an error of the caller")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "an error of the caller"), done.stderr
    n_reads = len((tmp_path / "reads").read_text().split())
    assert 1 <= n_reads < len(open_checkpoint(folder).tensors) // 2
