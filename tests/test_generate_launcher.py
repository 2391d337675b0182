"""The generate launcher as a user meets it: flags in, text out, one message for a mistake."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "sharded_llama" / "demo_checkpoint"


def run(*flags, stdin="", simulate=1):
    """(exit status, standard output, standard error) of the launcher."""
    # One decode step per dispatch: one kind of step to compile instead of two.
    start = (sys.executable, "-m", "launch.generate", f"--simulate_devices={simulate}", "--decode_steps=1")
    command = [*start, *map(str, flags)]
    done = subprocess.run(
        command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=200, env={**os.environ}, check=False
    )
    return done.returncode, done.stdout, done.stderr


def fails(*flags, simulate=1):
    """The one message that a mistake prints."""
    status, stdout, stderr = run(*flags, simulate=simulate)
    assert status == 1
    assert stdout == ""
    assert "Traceback" not in stderr
    return stderr


class TestOutput:
    def test_text_to_stdout_the_rest_to_stderr(self):
        status, stdout, stderr = run("--checkpoint=demo", "--prompt=ROMEO:", "--max_new_tokens=8", "--temperature=0")
        assert status == 0, stderr
        assert stdout.startswith("ROMEO:\n")
        assert stdout.endswith("\n")
        for part in ("prompt tokens, 8 new tokens", "ms to first token", "tokens/s", "mesh data:1,model:1 on 1 cpu"):
            assert part in stderr
        assert "%|" not in stderr, "no progress bar in a pipe"

    def test_several_prompts_and_json_lines(self, tmp_path):
        output = tmp_path / "out.jsonl"
        prompts = ["ROMEO:", "", "O naïve 🙂"]
        status, stdout, stderr = run(
            *("--checkpoint=demo", "--mesh=data:2,model:4", "--max_new_tokens=6", f"--output={output}"),
            *(f"--prompt={p}" for p in prompts),
            simulate=8,
        )
        assert status == 0, stderr
        records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert [r["prompt"] for r in records] == prompts
        for record in records:
            assert set(record) == {"prompt", "text", "token_ids", "finish_reason"}
            assert len(record["token_ids"]) == 6
            assert record["finish_reason"] == "length"
            assert record["prompt"] + record["text"] + "\n" in stdout
        assert stdout.index("prompt 1 of 3") < stdout.index("prompt 2 of 3") < stdout.index("prompt 3 of 3")
        assert [f.name for f in tmp_path.iterdir()] == ["out.jsonl"]

    def test_prompts_from_standard_input_and_files(self, tmp_path):
        status, stdout, stderr = run(
            "--checkpoint=demo", "--prompt_file=-", "--max_new_tokens=4", stdin="First Citizen:\nBefore we\n"
        )
        assert status == 0, stderr
        assert stdout.startswith("First Citizen:\nBefore we")
        answers = tmp_path / "answers.jsonl"
        file = tmp_path / "prompts.jsonl"
        file.write_text('{"prompt": "KING:"}\n\n{"prompt": "QUEEN:"}\n')
        status, _, stderr = run(
            "--checkpoint=demo", f"--prompt_file={file}", "--max_new_tokens=4", f"--output={answers}"
        )
        assert status == 0, stderr
        assert [json.loads(line)["prompt"] for line in answers.read_text().splitlines()] == ["KING:", "QUEEN:"]

    def test_flags_beat_the_config(self, tmp_path):
        output = tmp_path / "out.jsonl"
        status, _, stderr = run(
            *("--config=configs/demo.py", "--config.generate.max_new_tokens=3", "--config.mesh.model=2"),
            *("--mesh=data:2", "--prompt=A", f"--output={output}"),
            simulate=4,
        )
        assert status == 0, stderr
        assert "mesh data:2,model:1" in stderr
        assert len(json.loads(output.read_text())["token_ids"]) == 3

    def test_a_seed_repeats_the_text(self):
        flags = ("--checkpoint=demo", "--prompt=A", "--temperature=1", "--max_new_tokens=12", "--dtype=float32")
        texts = [run(*flags, f"--seed={seed}")[1] for seed in (5, 5, 6)]
        assert texts[0] == texts[1] != texts[2]


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
