"""The benchmark launcher on a tiny model: what each mode measures, writes and draws, and one message for a mistake."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from sharded_llama.benchmark import ceilings, fit, run
from sharded_llama.checkpoint import save_weights
from sharded_llama.config import LlamaConfig
from sharded_llama.engine.llm import LLM
from sharded_llama.errors import EngineError, ShardedLlamaError
from sharded_llama.mesh import make_mesh

ROOT = Path(__file__).parent.parent
TRACE = ROOT / "../shared/data/traces/sharegpt-llama-3.1-8b-300-sps10.jsonl"
MODEL = {"n_layers": 1, "dim": 32, "n_heads": 2, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 32, "vocab_size": 64}
OWN = {}  # flags of this launcher that another has too
# Few shapes of steps to compile.
SMALL = ("--max_num_seqs=2", "--max_num_batched_tokens=34", "--decode_steps=2", "--rounds=2")


def launcher():
    return importlib.import_module("launch.benchmark")


@pytest.fixture(scope="module", autouse=True)
def _own_flags():
    """launch.compare, which other tests import in this process, has a --mode too."""
    theirs = flags.FLAGS["mode"] if "mode" in flags.FLAGS else None  # noqa: SIM401 (it has no get)
    if theirs is not None:
        delattr(flags.FLAGS, "mode")
    if "launch.benchmark" in sys.modules:
        flags.FLAGS["mode"] = OWN["mode"]
    launcher()
    OWN["mode"] = flags.FLAGS["mode"]
    yield
    delattr(flags.FLAGS, "mode")
    if theirs is not None:
        flags.FLAGS["mode"] = theirs


@pytest.fixture(autouse=True)
def _small_arrays(monkeypatch):
    """Nobody looks at how fast this machine is."""
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(ceilings.CUBE, "cpu", 128)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with the tiny model."""
    config = LlamaConfig(**MODEL, norm_eps=1e-5, rope_theta=1e4, max_seq_len=512, dtype="float32")
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_weights(LLM.random(config, make_mesh(1, 1), progress=False).weights, config, folder)
    return folder


def launch(*args):
    """The launcher within this process."""
    with flagsaver.flagsaver():
        flags.FLAGS(["benchmark", *map(str, args)])
        launcher().main()


@pytest.fixture
def measured(checkpoint, tmp_path, capsys):
    """Runs a mode: gives the record that it wrote, and what it printed."""

    def measure(mode, *args):
        launch(f"--mode={mode}", f"--checkpoint={checkpoint}", "--mesh=data:1", f"--out={tmp_path}", *SMALL, *args)
        written = json.loads((tmp_path / f"{mode}.json").read_text())
        assert set(written) == {"device", "versions", "command", "commit", "workload", "results", "ceilings"}
        assert written["device"] == "1 x cpu"
        out = capsys.readouterr().out
        assert str(tmp_path / f"{mode}.json") in out
        pictures = [f for f in tmp_path.iterdir() if f.suffix == ".png"]
        assert [f.name for f in pictures] == ([] if "--nopicture" in args else [f"{mode}.png"])
        assert all(f.read_bytes().startswith(b"\x89PNG") for f in pictures)
        assert not [f for f in tmp_path.iterdir() if f.suffix == ".tmp"]
        *rows, last = written["results"]
        if mode != "load":
            assert last == {"what": "compilations after start", "count": 0}
            assert "Compilations after start: 0." in out
            assert min(written["ceilings"]["bytes_per_s"], written["ceilings"]["flops_per_s"]) > 0
        return written, rows, out

    return measure


def check_limit(row, ceilings):
    """The limit is its own sum of the work and the ceilings in the record."""
    work = row["work"]
    matmul = max(work["matmul_bytes"] / ceilings["bytes_per_s"], work["matmul_flops"] / ceilings["flops_per_s"])
    attention = max(
        work["attention_bytes"] / ceilings["bytes_per_s"], work["attention_flops"] / ceilings["flops_per_s"]
    )
    assert row["limit_ms"] == pytest.approx(1e3 * (matmul + attention))
    assert row["share"] == pytest.approx(row["limit_ms"] / row["ms"])


class TestModes:
    def test_latency_beside_transformers(self, measured):
        flags = ("--batches=1,2", "--context=90", "--steps=4", "--input_len=20", "--peer=hf")
        written, rows, out = measured("latency", *flags)
        assert [row["what"] for row in rows] == ["decode", "decode", "ttft"]
        for row, batch in zip(rows, (1, 2), strict=False):
            assert row["batch"] == batch
            assert row["context"] == pytest.approx(90, abs=12)
            assert row["tokens_per_s"] == pytest.approx(1e3 * batch / row["ms"])
            # Products of one layer and the output matrix, and the cache of the live tokens, in float32.
            params = 4 * 32 * 32 + 3 * 32 * 32 + 64 * 32
            assert row["work"]["matmul_bytes"] == 4 * params
            assert row["work"]["matmul_flops"] == 2 * params * batch
            assert row["work"]["attention_bytes"] == pytest.approx(batch * row["context"] * 2 * 2 * 16 * 4)
        for row in rows:
            check_limit(row, written["ceilings"])
            assert len(row["samples"]) == len(row["hf_samples"]) == 2
            assert row["ms"] == pytest.approx(sum(row["samples"]) / 2)
            assert row["speed_ours_over_peer"] == pytest.approx(row["hf_ms"] / row["ms"])
            assert row["arithmetic"] in out
        assert (rows[2]["rows"], rows[2]["tokens"]) == (1, 20)
        rates = written["ceilings"]["matmul"]
        assert rates["jax_over_torch"] == pytest.approx(rates["jax_flops_per_s"] / rates["torch_flops_per_s"])
        assert {"torch", "transformers", "jaxlib"} < set(written["versions"])
        assert "speed ours/theirs" in out

    def test_a_sweep_of_throughput(self, measured):
        _, rows, out = measured("throughput", "--requests=3x20x5,1x10x4", "--concurrencies=1,2")
        found = [(r["workload"], r["concurrency"], r["at_once"]) for r in rows]
        assert found == [("3x20x5", 1, 1), ("1x10x4", 1, 1), ("3x20x5", 2, 2), ("1x10x4", 2, 1)]
        for row in rows:
            n, n_in, n_out = map(int, row["workload"].split("x"))
            assert row["requests"] == n
            assert row["output_tokens_per_s"] == pytest.approx(n * n_out / row["seconds"])
            assert row["input_tokens_per_s"] == pytest.approx(n * n_in / row["seconds"])
            assert row["total_tokens_per_s"] == pytest.approx(n * (n_in + n_out) / row["seconds"])
            assert row["share"] == pytest.approx(row["limit_s"] / row["seconds"])
            assert (row["preemptions"], row["cached_tokens"]) == (0, 0), "prompts are new in every run"
            for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
                assert 0 < row[name]["p50"] <= row[name]["p99"] <= 1e3 * row["seconds"]
            assert row["ttft_ms"]["mean"] < row["e2e_ms"]["mean"]
        one = rows[0]  # one after the other: the run is what its requests take
        assert 3 * one["e2e_ms"]["mean"] <= 1e3 * one["seconds"]
        assert "TTFT" in out

    def test_a_trace(self, measured, tmp_path):
        # The second asks for what the first had: two pages of its three are found.
        ids = [(7 * i) % 1000 for i in range(40)]
        lines = [
            {"input_toks": 40, "output_toks": 6, "arrival_time_ns": 10**9, "input_tok_ids": ids},
            {"input_toks": 40, "output_toks": 3, "arrival_time_ns": 16 * 10**8, "input_tok_ids": ids},
            {"input_toks": 600, "output_toks": 3, "arrival_time_ns": 2 * 10**9},
        ]
        file = tmp_path / "trace.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        written, (row,), _ = measured(
            "throughput", f"--trace={file}", "--arrival=trace", "--skip_long", "--through=engine"
        )
        assert written["workload"]["settings"]["trace"] == {"requests": 2, "input_tokens": 80, "output_tokens": 9}
        assert (row["workload"], row["requests"], row["cached_tokens"]) == ("trace", 2, 32)
        assert row["seconds"] > 0.6, "the second came 0.6 s after the first"
        assert row["limit_s"] >= 0.6
        assert row["output_tokens_per_s"] == pytest.approx(9 / row["seconds"])

    def test_prefill(self, measured):
        written, rows, _ = measured("prefill", "--prefill=1x40,2x16", "--nopicture", "--enable_prefix_caching=false")
        assert [(r["rows"], r["tokens"]) for r in rows] == [(1, 40), (2, 16)]
        for row in rows:
            check_limit(row, written["ceilings"])
            n = row["rows"]
            assert row["work"]["matmul_flops"] == 2 * (7 * 32 * 32 * n * row["tokens"] + 64 * 32 * n)
            assert row["tokens_per_s"] == pytest.approx(1e3 * n * row["tokens"] / row["ms"])

    def test_load(self, measured, checkpoint):
        _, rows, out = measured("load")
        assert rows == []
        (row,) = json.loads((Path(out.split()[-1]).parent / "load.json").read_text())["results"]
        n_params = 7 * 32 * 32 + 2 * 64 * 32 + 3 * 32
        assert row["gb"] == pytest.approx(4 * n_params / 1e9)
        assert row["gb_per_s"] == pytest.approx(row["gb"] / row["seconds"])
        assert (row["format"], len(row["samples"])) == ("Hugging Face safetensors", 2)


def test_two_starts_of_new_processes(checkpoint, tmp_path, monkeypatch, capsys):
    """Each is `python -m launch.benchmark --mode=start`; steps of one shape make them short."""
    args = ["--mode=startup", f"--checkpoint={checkpoint}", "--simulate_devices=1", f"--out={tmp_path}"]
    args += ["--deterministic", "--max_num_seqs=2"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *args])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)
    launch(*args)
    written = json.loads((tmp_path / "startup.json").read_text())
    cold, warm = written["results"]
    assert (cold["cache"], warm["cache"], written["device"]) == ("cold", "warm", "1 x cpu")
    for row in (cold, warm):
        assert {"import", "open", "compile", "first token"} < set(row["phases"])
        assert min(row["phases"].values()) >= 0
        assert row["total_s"] == pytest.approx(sum(row["phases"].values()))
        assert row["phases"]["import"] > 0.1
    assert cold["executables"] == warm["executables"] > 0
    assert (tmp_path / "startup.png").read_bytes().startswith(b"\x89PNG")
    assert "first token" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections loads config files by it
def test_random_weights_of_a_config():
    with flagsaver.flagsaver():
        flags.FLAGS(["benchmark", f"--config={ROOT}/configs/demo.py", "--random_weights", "--dtype=float32"])
        opened = launcher().open_model()
        llm = opened.make()
    assert (opened.source, llm.config.dim, llm.config.dtype) == (None, 256, "float32")
    assert llm.weights.tok_embeddings.shape == (1024, 256)


FAKE_VLLM = """
import time

seconds = 0.0
time.perf_counter = lambda: seconds  # nothing but what is generated takes time

class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos, detokenize):
        assert (temperature, ignore_eos, detokenize) == (0.0, True, False)
        self.max_tokens = max_tokens

class LLM:
    def __init__(self, model, dtype, load_format, skip_tokenizer_init, max_model_len, max_num_seqs, **_):
        assert (dtype, load_format, skip_tokenizer_init, max_model_len, max_num_seqs) == (
            "float32", "dummy", True, 512, 2)
        assert '"vocab_size": 64' in open(model + "/config.json").read()
        self.llm_engine = self.model_config = self

    def get_vocab_size(self):
        return 64

    def generate(self, prompts, params, use_tqdm):
        assert all(0 <= i < 64 for p in prompts for i in p["prompt_token_ids"])
        global seconds
        seconds += 0.001 * len(prompts) * params.max_tokens
"""


def test_a_peer_in_a_process_of_its_own(checkpoint, tmp_path, monkeypatch, capsys):
    """What stands for vLLM takes a millisecond for each row and token, by a clock of its own."""
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.chdir(ROOT)
    args = [f"--checkpoint={checkpoint}", "--mode=latency", "--peer=vllm", "--simulate_devices=1", "--nopicture"]
    args += [*SMALL, "--batches=2", "--context=60", "--steps=4", "--input_len=7", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *args])
    launch(*args)
    decode, ttft, count = json.loads((tmp_path / "latency.json").read_text())["results"]
    assert decode["vllm_ms"] == pytest.approx(2), "two rows"
    assert decode["speed_ours_over_peer"] == pytest.approx(decode["vllm_ms"] / decode["ms"])
    assert ttft["vllm_ms"] == pytest.approx(1)
    assert count["count"] == 0
    assert "vllm ms" in capsys.readouterr().out


class TestMistakes:
    @pytest.fixture(autouse=True)
    def _nothing_is_loaded(self, monkeypatch):
        def fail(*_):
            raise AssertionError("something was loaded or measured")

        monkeypatch.setattr(launcher().Opened, "make", fail)
        monkeypatch.setattr(launcher().run, "measure", fail)
        monkeypatch.setattr(launcher().single, "load_seconds", fail)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ([], "say what to measure: --mode=latency"),
            (["--mode=latency", "--requests=1x2x3"], "--requests belongs to --mode=throughput, not to --mode=latency"),
            (["--mode=prefill", "--batches=1"], "--batches belongs to --mode=latency"),
            (["--mode=latency", "--rest_ms=300"], "--rest_ms belongs to --mode=prefill"),
            (["--mode=throughput"], "needs --requests=NxINxOUT"),
            (["--mode=throughput", "--requests=1x2"], "'1x2' is not NxINxOUT"),
            (["--mode=throughput", "--requests=1x2x3", "--trace=x"], "--trace and --requests cannot be given together"),
            (["--mode=throughput", "--requests=1x2x3", "--arrival=trace"], "--arrival belongs to --trace"),
            (
                ["--mode=throughput", "--requests=1x2x3", "--concurrencies=1", "--request_rate=2"],
                "--concurrencies and --request_rate cannot be given together",
            ),
            (
                ["--mode=throughput", "--requests=1x2x3", "--concurrencies=1", "--max_concurrency=2"],
                "--concurrencies and --max_concurrency cannot be given together",
            ),
            (
                ["--mode=throughput", "--trace=x", "--arrival=trace", "--request_rate=2"],
                "--arrival and --request_rate cannot be given together",
            ),
            (["--mode=throughput", "--requests=1x2x3", "--request_rate=0"], "--request_rate=0 must be from"),
            (["--mode=throughput", "--requests=1x2x3", "--request_rate=nan"], "--request_rate=nan must be from"),
            (["--mode=throughput", "--trace=/nowhere"], "--trace=/nowhere: there is no such file"),
            (["--mode=throughput", "--requests=1x2x3", "--num_requests=3"], "--num_requests belongs to --trace"),
            (["--mode=throughput", "--requests=1x500x20"], "sequences of 520 tokens, beyond max_model_len=512"),
            (
                ["--mode=throughput", "--requests=1x2x3", "--max_concurrency=3"],
                "--max_concurrency=3: 3 sequences at a time do not fit max_num_seqs=2",
            ),
            (["--mode=throughput", "--requests="], "needs --requests=NxINxOUT"),
            (["--mode=latency", "--batches=4"], "4 sequences at a time do not fit max_num_seqs=2"),
            (["--mode=latency", "--batches=0"], "--batches=0: expected whole numbers above 0"),
            (["--mode=latency", "--batches="], "--batches: give from 1 to 64"),
            (["--mode=latency", "--context=500"], "--batches=1 with --context=500 needs sequences of"),
            (["--mode=latency", "--input_len=512"], "--input_len=512 needs sequences of 513 tokens"),
            (["--mode=latency", "--kv_cache_bytes=1000"], "but there are 0.00 (kv_cache_bytes=1000"),
            (["--mode=prefill", "--prefill=3x16"], "--prefill=3x16: 3 sequences at a time do not fit"),
            (["--mode=prefill", "--prefill=1x512"], "--prefill=1x512 needs sequences of 513 tokens"),
            (["--mode=prefill", "--prefill=8"], "'8' is not ROWSxTOKENS"),
            (["--mode=load", "--peer=hf"], "--peer=hf has no --mode=load"),
            (["--mode=throughput", "--trace=x", "--peer=hf"], "--peer=hf runs --requests that all come at once"),
            (["--mode=latency", "--peer=vllm"], "--peer=vllm needs the package vllm: pip install vllm"),
            (["--mode=latency", "--random_weights"], "--random_weights and --checkpoint cannot be given together"),
            (["--mode=latency", "--num_processes=2"], "the benchmark runs in one process"),
            (["--mode=latency", "--name=a/b"], "--name='a/b': give letters"),
            (["--mode=latency", "--out=/dev/null"], "/dev/null is not a folder that can be written to"),
            (["--mode=latency", "--mesh=model:4"], "model=4 does not fit 2 query heads"),
            (["--mode=latency", "--max_model_len=1000"], "max_model_len=1000 is beyond the context of 512"),
        ],
        ids=lambda x: " ".join(x) if isinstance(x, list) else "",
    )
    def test_one_message(self, args, message, checkpoint, tmp_path):
        given = [f"--checkpoint={checkpoint}", "--mesh=data:1", f"--out={tmp_path}", *SMALL, *args]
        with pytest.raises(ShardedLlamaError) as raised:
            launch(*given)
        assert message in str(raised.value)
        assert list(tmp_path.iterdir()) == []

    def test_models_that_are_not_said(self, checkpoint):
        for args, message in (
            (["--mode=latency", "--random_weights"], "--random_weights needs a model: give --config=FILE"),
            (["--mode=latency"], "no checkpoint: give --checkpoint=FOLDER"),
            (["--mode=load"], "--mode=load reads a checkpoint: give --checkpoint=FOLDER"),
            (["--mode=latency", "--checkpoint=/nowhere"], "/nowhere"),
        ):
            with pytest.raises(ShardedLlamaError, match=message):
                launch(*args)

    def test_weights_that_do_not_fit(self, checkpoint, monkeypatch):
        monkeypatch.setattr(fit, "device_bytes", lambda _: 10_000)
        with pytest.raises(ShardedLlamaError, match=r"the weights take 0\.0 GB of each device"):
            launch("--mode=latency", f"--checkpoint={checkpoint}", "--mesh=data:1")

    def test_pictures_need_matplotlib(self, checkpoint, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ShardedLlamaError, match=r"pip install 'sharded-llama\[view\]', or give --nopicture"):
            launch("--mode=latency", f"--checkpoint={checkpoint}")

    @pytest.mark.skipif(not TRACE.is_file(), reason="needs the real trace of ../shared/data/traces")
    def test_a_long_request_of_the_real_trace(self, checkpoint):
        with pytest.raises(ShardedLlamaError, match=r"line 248 of the trace needs sequences of 4765 .*--skip_long"):
            launch("--mode=throughput", f"--trace={TRACE}", f"--checkpoint={checkpoint}", "--mesh=data:1")


def test_a_peer_that_fails_is_told(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    job = {"peer": "hf", "folder": "/nowhere", "dtype": "float32", "device": "cpu", "rows": [], "steps": 1, "rounds": 1}
    with pytest.raises(EngineError, match="--peer=hf: its process ended with status 1"):
        run.run_peer(job)
