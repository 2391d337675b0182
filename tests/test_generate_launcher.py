"""The generate launcher as a user meets it: flags in, text out, one message for a mistake."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import launchers
import pytest
from absl import flags
from absl.testing import flagsaver

from launch import engine_flags, generate, metrics_flags, sampling_flags
from launch.chat import converse
from launch.metrics_view import MetricsPrinter
from launch.printer import Printer
from sharded_llama.engine.engine import Engine
from sharded_llama.engine.outputs import CompletionOutput, RequestOutput, StreamEvent
from sharded_llama.errors import ConfigError, EngineError, RequestError
from sharded_llama.sampling.entropy import Strategy, TokenMetrics
from sharded_llama.sampling.entropy_settings import EntropySettings
from sharded_llama.sampling.structured import StructuredOutputs
from sharded_llama.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "sharded_llama" / "demo_checkpoint"
METRICS = TokenMetrics(4.0, 6.0, 2.0, 0.5, 0.125, 0.75, Strategy.RESAMPLE, 1.5, 0.5, 27, 0.03, -1.5)


def run(*flags, stdin="", simulate=1):
    """(exit status, standard output, standard error) of the launcher."""
    # One decode step per dispatch: one kind of step to compile instead of two.
    return launchers.run("generate", f"--simulate_devices={simulate}", "--decode_steps=1", *flags, stdin=stdin)


def fails(*flags, simulate=1):
    """The one message that a mistake prints."""
    status, stdout, stderr = run(*flags, simulate=simulate)
    assert status == 1
    assert stdout == ""
    assert "Traceback" not in stderr
    return stderr


@pytest.fixture
def model(short_demo):
    return f"--checkpoint={short_demo}"


class TestOutput:
    def test_text_to_stdout_the_rest_to_stderr(self):
        flags = ("--checkpoint=demo", "--prompt=ROMEO:", "--max_new_tokens=8", "--temperature=0", "--decode_steps=1")
        command = [sys.executable, "-m", "launch.generate", "--simulate_devices=1", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
        status, stdout, stderr = done.returncode, done.stdout, done.stderr
        assert status == 0, stderr
        assert stdout.startswith("ROMEO:\n")
        assert stdout.endswith("\n")
        for part in ("prompt tokens, 8 new tokens", "ms to first token", "tokens/s", "mesh data:1,model:1 on 1 cpu"):
            assert part in stderr
        assert "%|" not in stderr, "no progress bar in a pipe"

    def test_several_prompts_and_json_lines(self, tmp_path, model):
        output = tmp_path / "out.jsonl"
        prompts = ["ROMEO:", "", "O naïve 🙂"]
        status, stdout, stderr = run(
            *(model, "--mesh=data:2,model:4", "--max_new_tokens=6", f"--output={output}"),
            *(f"--prompt={p}" for p in prompts),
            simulate=8,
        )
        assert status == 0, stderr
        records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert [r["prompt"] for r in records] == prompts
        for record in records:
            assert set(record) == {"prompt", "index", "text", "token_ids", "finish_reason", "stop_reason"}
            assert (record["index"], record["stop_reason"]) == (0, None)
            assert len(record["token_ids"]) == 6
            assert record["finish_reason"] == "length"
            assert record["prompt"] + record["text"] + "\n" in stdout
        assert stdout.index("prompt 1 of 3") < stdout.index("prompt 2 of 3") < stdout.index("prompt 3 of 3")
        assert [f.name for f in tmp_path.iterdir()] == ["out.jsonl"]

    def test_prompts_from_standard_input_and_files(self, tmp_path, model):
        status, stdout, stderr = run(
            model, "--prompt_file=-", "--max_new_tokens=4", stdin="First Citizen:\nBefore we\n"
        )
        assert status == 0, stderr
        assert stdout.startswith("First Citizen:\nBefore we")
        answers = tmp_path / "answers.jsonl"
        file = tmp_path / "prompts.jsonl"
        file.write_text('{"prompt": "KING:"}\n\n{"prompt": "QUEEN:"}\n')
        status, _, stderr = run(model, f"--prompt_file={file}", "--max_new_tokens=4", f"--output={answers}")
        assert status == 0, stderr
        assert [json.loads(line)["prompt"] for line in answers.read_text().splitlines()] == ["KING:", "QUEEN:"]

    def test_flags_beat_the_config(self, tmp_path, model):
        output = tmp_path / "out.jsonl"
        status, _, stderr = run(
            *("--config=configs/demo.py", model, "--config.model.n_layers=1"),
            *("--config.generate.max_new_tokens=3", "--config.mesh.model=2"),
            *("--config.generate.sampler=entropy(top_k=4)", "--show_metrics", "--metrics_picture="),
            *("--mesh=data:1", "--prompt=A", f"--output={output}"),
            simulate=8,  # as here: what TestMetrics compiled is in the cache
        )
        assert status == 0, stderr
        assert "mesh data:1,model:1" in stderr
        record = json.loads(output.read_text())
        assert len(record["token_ids"]) == len(record["metrics"]) == 3
        assert "picture" not in stderr

    def test_several_answers_with_a_sampler_and_stop_strings(self, tmp_path, model):
        output = tmp_path / "out.jsonl"
        status, stdout, stderr = run(
            *(model, "--n=3", "--sampler=temperature(1.2) top_p(0.95) seed(7)", "--max_new_tokens=30"),
            *("--stop=e", "--stop=\n\n", "--logprobs=2", "--prompt=ROMEO:", f"--output={output}"),
        )
        assert status == 0, stderr
        records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert [(r["prompt"], r["index"]) for r in records] == [("ROMEO:", i) for i in range(3)]
        assert len({r["text"] for r in records}) == 3
        assert stdout == "".join(f"--- answer {i + 1} of 3 ---\nROMEO:{r['text']}\n" for i, r in enumerate(records)), (
            "each under its own line, whichever came first"
        )
        assert "e" in {r["stop_reason"] for r in records}
        for record in records:
            assert "e" not in record["text"]
            assert (record["finish_reason"] == "stop") == (record["stop_reason"] in ("e", "\n\n"))
            assert len(record["logprobs"]) == len(record["token_ids"])
            for token, found in zip(record["token_ids"], record["logprobs"], strict=True):
                assert (found[0]["token_id"], found[0]["rank"] >= 1) == (token, True)
                assert 2 <= len(found) <= 3
                assert all(f["logprob"] < 0 and isinstance(f["decoded_token"], str) for f in found)
        text = "".join(of_token[0]["decoded_token"] for of_token in records[0]["logprobs"])
        assert text.startswith(records[0]["text"])

    def test_an_answer_of_a_given_form(self, tmp_path, model):
        schema, output = tmp_path / "schema.json", tmp_path / "out.jsonl"
        schema.write_text('{"enum": ["yes", "no", 7]}')
        status, _, stderr = run(
            model, f"--json_schema={schema}", "--prompt=A", "--sampler=greedy", f"--output={output}"
        )
        assert status == 0, stderr
        record = json.loads(output.read_text())
        assert json.loads(record["text"]) in ("yes", "no", 7)
        assert record["finish_reason"] == "stop"

    def test_a_seed_repeats_the_text(self, model):
        flags = (model, "--prompt=A", "--temperature=1", "--max_new_tokens=12")
        texts = [run(*flags, f"--seed={seed}")[1] for seed in (5, 5, 6)]
        assert texts[0] == texts[1] != texts[2]


def settings(*args):
    """The sampling settings of these flags."""
    with flagsaver.flagsaver():
        flags.FLAGS(["generate", *args])
        return {name: value for name, value in sampling_flags.sampling_settings().items() if value is not None}


def config_file(tmp_path, **generate):
    file = tmp_path / "config.py"
    lines = [
        "from ml_collections import ConfigDict",
        f"def get_config(): return ConfigDict({{'generate': {generate}}})",
    ]
    file.write_text("\n".join(lines))
    return f"--config={file}"


class TestSamplingFlags:
    def test_defaults(self):
        assert settings() == {"max_tokens": 128}

    def test_each_flag(self):
        given = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "seed": 7, "min_tokens": 2, "n": 3}
        given |= {"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "logprobs": 5}
        made = settings(*(f"--{name}={value}" for name, value in given.items()), "--ignore_eos", "--max_new_tokens=9")
        assert made == given | {"ignore_eos": True, "max_tokens": 9}

    def test_stop_strings(self):
        assert settings("--stop=a,b", "--stop=\n", "--stop= x")["stop"] == ["a,b", "\n", " x"]

    def test_a_sampler(self):
        made = settings("--sampler=temperature(0.7) top_k(5)", "--seed=4", "--presence_penalty=1")
        assert made == {"temperature": 0.7, "top_k": 5, "seed": 4, "presence_penalty": 1.0, "max_tokens": 128}
        assert settings("--sampler=entropy(top_k=5)")["entropy"] == EntropySettings(top_k=5)

    def test_a_flag_comes_before_the_config(self, tmp_path):
        config = config_file(tmp_path, sampler="top_p(0.5) seed(1)", presence_penalty=0.5)
        assert settings(config) == {"top_p": 0.5, "seed": 1, "presence_penalty": 0.5, "max_tokens": 128}
        made = settings(config, "--sampler=min_p(0.1)", "--seed=2")
        assert made == {"min_p": 0.1, "seed": 2, "presence_penalty": 0.5, "max_tokens": 128}
        config = config_file(tmp_path, temperature=0.5, max_new_tokens=7, seed=3, n=2)
        assert settings(config, "--sampler=greedy") == {"temperature": 0.0, "seed": 3, "n": 2, "max_tokens": 7}

    def test_forms(self, tmp_path):
        (tmp_path / "schema").write_text('{"type": "integer"}')
        (tmp_path / "grammar").write_text('start: "a"')
        for flag, form in [
            ([f"--json_schema={tmp_path / 'schema'}"], {"json": {"type": "integer"}}),
            (["--regex=a+"], {"regex": "a+"}),
            (["--choice=yes", "--choice=no, never"], {"choice": ["yes", "no, never"]}),
            ([f"--grammar={tmp_path / 'grammar'}"], {"grammar": 'start: "a"'}),
        ]:
            assert settings(*flag)["structured_outputs"] == StructuredOutputs(**form)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--sampler=greedy", "--temperature=1"], "temperature=1.0 contradicts the sampler 'greedy'"),
            (["--sampler=top_p(0.9)", "--min_p=0.1"], r"min_p=0.1 contradicts the sampler 'top_p\(0.9\)'"),
            (["--sampler=entropy", "--top_k=3"], "top_k=3 contradicts the sampler 'entropy'"),
            (["--sampler=seed(3)", "--seed=3"], r"seed=3 contradicts the sampler 'seed\(3\)': say all of it in one"),
            (["--sampler=top_q(3)"], r"(?s)did you mean 'top_p'\?\n  top_q\(3\)\n  \^{5}$"),
            (["--sampler="], "sampler: it is empty"),
            (["--stop="], "stop=.* must be at most 32 texts, each of 1 to 1024 characters"),
            (["--min_tokens=200"], "min_tokens=200 must be at most max_tokens=128"),
            (["--presence_penalty=3"], "presence_penalty=3.0 must be a number from -2 to 2"),
            (["--regex=a", "--choice=b"], "structured_outputs needs exactly one of .* but regex and choice"),
            (["--json_schema=/nowhere"], "--json_schema=/nowhere: cannot be read as UTF-8 text"),
            (["--grammar=/dev/zero"], "--grammar=/dev/zero: has more than 1048576 bytes"),
        ],
        ids=lambda x: x[0] if isinstance(x, list) else "",
    )
    def test_mistakes(self, args, message):
        with pytest.raises(RequestError, match=message):
            settings(*args)

    def test_contradictions_within_the_config(self, tmp_path):
        config = config_file(tmp_path, sampler="greedy", temperature=0.5)
        with pytest.raises(RequestError, match=r"temperature=0.5 contradicts the sampler 'greedy'"):
            settings(config)


def test_answers_are_printed_in_order(capsys):
    printer = Printer(["P", "Q"], 2)
    assert capsys.readouterr().out == ""
    for request, index, text, reason in [
        (1, 0, "c", None),
        (0, 1, "b", "stop"),
        (0, 0, "a", None),
        (0, 0, "A", "length"),
        (1, 1, "", "stop"),
        (1, 0, "C", "stop"),
    ]:
        printer.add(StreamEvent(request, index, text, (), reason))
        if text == "a":
            assert capsys.readouterr().out == "--- prompt 1 of 2, answer 1 of 2 ---\nPa"
        if text == "A":
            second = "--- prompt 1 of 2, answer 2 of 2 ---\nPb\n"
            assert capsys.readouterr().out == f"A\n{second}--- prompt 2 of 2, answer 1 of 2 ---\nQc"
    assert capsys.readouterr().out == "C\n--- prompt 2 of 2, answer 2 of 2 ---\nQ\n"


def run_here(*args, checkpoint="demo"):
    """The launcher within this process."""
    with flagsaver.flagsaver():
        flags.FLAGS(["generate", f"--checkpoint={checkpoint}", "--mesh=data:1", "--max_new_tokens=8", *map(str, args)])
        generate.main()


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


class TestMetrics:
    def test_the_text_the_picture_and_the_records(self, short_demo, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        made = ("--show_metrics", "--prompt=ROMEO:", "--output=out.jsonl")
        run_here("--sampler=entropy seed(3)", *made, checkpoint=short_demo)
        (record,) = lines(tmp_path / "out.jsonl")
        out, err = capsys.readouterr()
        assert out == f"ROMEO:{record['text']}\n", "no terminal: no colours and no legend"
        assert "picture: metrics.png" in err
        assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
        assert len(record["metrics"]) == len(record["token_ids"]) == 8
        names = {strategy.name.lower() for strategy in Strategy}
        for of_token in record["metrics"]:
            assert of_token["strategy"] in names
            assert 0 <= of_token["entropy"] <= 10, "bits, of 1024 tokens"
            assert len(of_token) == 12

    def test_several_answers_have_a_picture_each(self, tmp_path, monkeypatch):
        """But not those that ended before they had a token; of a very long one the beginning is drawn."""
        drawn = {}
        monkeypatch.setattr(metrics_flags, "write_picture", lambda path, *what: drawn.update({path.name: what}))
        tokenizer = load_tokenizer(DEMO)
        counts = ((3, 0), (1, metrics_flags.MAX_TOKENS + 1))
        outputs = [
            RequestOutput(
                *("r", "P", (1,)),
                tuple(CompletionOutput(i, "", (40,) * n, "length", metrics=(METRICS,) * n) for i, n in enumerate(two)),
            )
            for two in counts
        ]
        with flagsaver.flagsaver():
            flags.FLAGS(["generate", "--show_metrics", f"--metrics_picture={tmp_path / 'a.b.svg'}"])
            files = metrics_flags.draw_pictures(outputs, tokenizer)
            assert [path.name for path in metrics_flags.pictures(1)] == ["a.b.svg"]
            flags.FLAGS(["generate", "--show_metrics", "--metrics_picture="])
            assert metrics_flags.draw_pictures(outputs, tokenizer) == []
        assert [path.name for path in files] == list(drawn) == ["a.b-1.svg", "a.b-3.svg", "a.b-4.svg"]
        for n, (texts, metrics) in zip((3, 1, metrics_flags.MAX_TOKENS), drawn.values(), strict=True):
            assert texts == [tokenizer.decode([40])] * n
            assert metrics == [METRICS] * n

    def test_records(self):
        """JSON has no numbers that are not finite."""
        odd = METRICS._replace(entropy=math.nan, score=-math.inf)
        (record,) = metrics_flags.metrics_records(CompletionOutput(0, "", (5,), "stop", metrics=(odd,)))
        assert record == METRICS._asdict() | {"entropy": None, "score": None, "strategy": "resample"}

    def test_what_is_printed_on_a_terminal(self):
        """The legend once, then each answer with its tints, its heading and its prompt without."""

        class View(MetricsPrinter):
            def __init__(self):
                self.written = []

            def legend(self):
                self.written.append("legend")

            def write(self, text, metrics=()):
                self.written.append((text, *metrics))

            def write_plain(self, text):
                self.written.append(text)

        view = View()
        printer = Printer(["P"], 2, view)
        for index, text, metrics, reason in [
            (1, "c", ("m1",), None),
            (0, "a", ("m2",), None),
            (1, "", ("m3",), "stop"),
            (0, "b", None, "stop"),
        ]:
            printer.add(StreamEvent(0, index, text, (), reason, metrics=metrics))
        first = ["legend", "--- answer 1 of 2 ---\nP", ("a", "m2"), ("b",), "\n"]
        assert view.written == [*first, "--- answer 2 of 2 ---\nP", ("c", "m1"), ("", "m3"), "\n"]

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--show_metrics"], "shows what the entropy sampler saw: add --sampler=entropy"),
            (["--show_metrics", "--sampler=top_k(3)"], "add --sampler=entropy"),
            (["--metrics_picture=a.png", "--sampler=entropy"], "a.png is drawn with --show_metrics alone"),
            (["--show_metrics", "--sampler=entropy", "--metrics_picture=a.gif"], r"a\.gif: .* has to end with \.png"),
            (["--show_metrics", "--sampler=entropy", "--metrics_picture=/nowhere/a.png"], "folder does not exist"),
            (["--show_metrics", "--sampler=entropy", "--n=64", "--prompt=B"], "128 answers .* at most 64 are drawn"),
            (["--show_metrics", "--sampler=entropy", "--chat"], "--prompt does not go with --chat"),
            (["--sampler=entropy", "--num_speculative_tokens=2"], "does not go with the entropy sampler"),
        ],
        ids=lambda x: " ".join(x) if isinstance(x, list) else "",
    )
    def test_mistakes_show_before_the_model_is_loaded(self, args, message, monkeypatch):
        monkeypatch.setattr(generate.common, "load_model", None)
        with pytest.raises(RequestError, match=message):
            run_here("--prompt=A", *args)


class TestSpeculation:
    def test_the_summary_tells_of_it(self, short_demo, capsys):
        guesses = (f"--draft_model={short_demo}", "--num_speculative_tokens=3")
        run_here("--sampler=greedy", *guesses, "--prompt=ROMEO:", checkpoint=short_demo)
        out, err = capsys.readouterr()
        assert re.fullmatch(r"ROMEO:.+\n", out, re.DOTALL)
        drafted, accepted = map(int, re.search(r"(\d+) tokens drafted, (\d+) accepted \(100%\)", err).groups())
        assert drafted == accepted > 0, "both are the same model"

    def test_flags_without_it(self):
        for flag in ("--draft_model=demo", "--prompt_lookup_max=4", "--prompt_lookup_min=2"):
            with flagsaver.flagsaver():
                flags.FLAGS(["generate", flag])
                name = flag.partition("=")[0]
                with pytest.raises(ConfigError, match=f"{name} belongs to guessed tokens: add --num_speculative"):
                    engine_flags.engine_options()


class TestErrors:
    def test_the_other_answers_come_out_first(self, short_demo, tmp_path, capsys, monkeypatch):
        """A sequence whose logits are no numbers is ended by the engine."""
        step = Engine.step

        def failing(engine):
            return [
                delta._replace(token_ids=(), finish_reason="error", error="not a number") if bad else delta
                for delta, bad in ((d, (d.request_id, d.index) == ("1", 0)) for d in step(engine))
            ]

        monkeypatch.setattr(Engine, "step", failing)
        output = tmp_path / "out.jsonl"
        with pytest.raises(EngineError) as raised:
            run_here(*(f"--prompt={p}" for p in ("ROMEO:", "A", "KING")), f"--output={output}", checkpoint=short_demo)
        message = "1 of 3 answers ended with an error:\n  prompt 2, answer 1: not a number"
        assert str(raised.value) == message
        records = lines(output)
        assert [r["finish_reason"] for r in records] == ["length", "error", "length"]
        assert [r.get("error") for r in records] == [None, "not a number", None]
        out, err = capsys.readouterr()
        assert all(f"{r['prompt']}{r['text']}\n" in out for r in records)
        assert "tokens/s" in err

    def test_a_conversation_goes_on(self, capsys, monkeypatch):
        """Without the message that had no whole answer."""
        asked = []

        class Model:
            def encode_chat(self, messages):
                asked.append([m["content"] for m in messages])
                return [1]

            def stream(self, _):
                is_bad = asked[-1][-1] == "bad"
                error = "not a number" if is_bad else None
                yield StreamEvent(0, 0, "An", (5,), None)
                yield StreamEvent(0, 0, "swer", (6,), "error" if is_bad else "stop", error=error)

        monkeypatch.setattr(sys, "stdin", io.StringIO("good\nbad\nlast\n"))
        converse(Model(), None, {})
        assert asked[1:] == [["good"], ["good", "Answer", "bad"], ["good", "Answer", "last"]]
        out, err = capsys.readouterr()
        assert (out, err) == ("Answer\n" * 3, "error: not a number\n")


class TestMistakes:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (
                ["--checkpoint=demo", "--prompt=x", "--temprature=1"],
                "Unknown command line flag 'temprature'. Did you mean",
            ),
            (["--checkpoint=demo", "--prompt=x", "--temperature=-1"], "temperature=-1.0 must be a number from 0"),
            (["--checkpoint=demo", "--prompt=x", "--top_p=2"], "top_p=2.0 must be"),
            (["--checkpoint=demo", "--prompt=x", "--max_new_tokens=0"], "--max_new_tokens=0"),
            (["--checkpoint=demo", "--prompt=x", "--mesh=data:2,model:4"], "needs 8 devices, but there are 1"),
            (["--checkpoint=demo", "--prompt=x", "--mesh=tensor:2"], "expected sizes such as data:2,model:4"),
            (["--checkpoint=demo"], "no prompt"),
            (["--prompt=x"], "no checkpoint"),
            (["--checkpoint=/nowhere", "--prompt=x"], "/nowhere"),
            (["--checkpoint=demo", "--prompt=" + "to be " * 600], "max_model_len=512 must hold the prompt and"),
            (["--checkpoint=demo", "--prompt_file=/nowhere"], "--prompt_file=/nowhere"),
            (["--checkpoint=demo", "--prompt=x", "--output=/nowhere/x"], "its folder does not exist"),
            (["--checkpoint=demo", "--prompt=x", "--output=/"], "--output=/ is a folder"),
            (["--checkpoint=demo", "--prompt=x", "--attention=gpu"], "attention='gpu' needs an NVIDIA GPU"),
            (["--config=configs/nothing.py", "--prompt=x"], "Configs that come with the package: configs/demo.py"),
            (["--config=configs/demo.py", "--config.mesh.modl=4", "--prompt=x"], 'Did you mean "model"'),
            (["--config=configs/llama3_1_8b.py", "--checkpoint=demo", "--prompt=x"], "dim: the config says 4096"),
            (["stray"], "unexpected argument 'stray'"),
            (["--checkpoint=demo", "--prompt=x", "--sampler=top_p(2)"], "  top_p(2)\n  ^^^^^"),
            (["--checkpoint=demo", "--prompt=x", "--logprobs=2"], "--logprobs are written with the answers: add --ou"),
            (["--checkpoint=demo", "--chat", "--n=2"], "--n does not go with --chat"),
        ],
        ids=lambda x: x[:40] if isinstance(x, str) else "",
    )
    def test_one_message(self, flags, message):
        assert message in fails(*flags)

    def test_heads_that_do_not_divide(self):
        stderr = fails("--checkpoint=demo", "--prompt=x", "--mesh=model:3", simulate=3)
        assert "Sizes that work: 1, 2, 4, 8" in stderr

    @pytest.mark.parametrize(
        ("file", "change", "message"),
        [
            ("tokenizer.json", None, "no tokenizer.json"),
            ("config.json", None, "config.json"),
            ("model.safetensors", lambda raw: raw[:5_000_000], "truncated"),
            (
                "config.json",
                lambda raw: raw.replace(b'"hidden_act": "silu"', b'"hidden_act": "gelu"'),
                "hidden_act='gelu'",
            ),
            ("config.json", lambda raw: raw.replace(b"704", b"705"), "is (704, 256), should be (705, 256)"),
            ("config.json", lambda raw: raw.replace(b'layers": 6', b'layers": 5'), "extra tensors: model.layers.5"),
            ("config.json", lambda raw: raw.replace(b'layers": 6', b'layers": 7'), "missing tensors: model.layers.6"),
            ("config.json", lambda raw: raw[:-9], "config.json"),
        ],
        ids=["tokenizer", "no_config", "truncated", "activation", "misshapen", "extra", "missing", "not_json"],
    )
    def test_broken_checkpoint(self, file, change, message, tmp_path):
        folder = tmp_path / "checkpoint"
        shutil.copytree(DEMO, folder)
        if change is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(change((folder / file).read_bytes()))
        stderr = fails(f"--checkpoint={folder}", "--prompt=x")
        assert message in stderr
        assert str(folder) in stderr
