"""The convert launcher as a user meets it: a model through every format, and one message for a mistake."""

import re
import subprocess
import sys
from pathlib import Path

import launchers
import pytest


def generate(checkpoint: str | Path, mesh: str) -> str:
    flags = ["--simulate_devices=4", f"--mesh={mesh}", "--prompt=ROMEO:", "--max_new_tokens=12", "--temperature=0"]
    flags.append("--decode_steps=1")  # one kind of step to compile instead of two
    done = launchers.run("generate", f"--checkpoint={checkpoint}", "--dtype=float32", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_through_every_format(tmp_path: Path, short_demo: Path):
    """Converted on and on, it writes the same text; the closing lines say what was done."""
    text, source = generate(short_demo, "data:1,model:1"), short_demo
    for format, mesh in (("meta", "data:1,model:4"), ("orbax", "data:2,model:2"), ("hf", "data:1,model:2")):
        output = tmp_path / format
        done = launchers.run(
            "convert", f"--checkpoint={source}", f"--output={output}", f"--format={format}", "--verify"
        )
        assert done.returncode == 0, done.stderr
        first, second = done.stdout.splitlines()
        assert re.fullmatch(
            r"Converted 11 tensors, 2,000,384 bytes in [\d.]+ s \([\d.]+ GB/s\), peak host memory 0\.\d+ GB: .*", first
        )
        assert second.startswith("Verified 11 tensors: the same bits as in ")
        assert "Converting" not in done.stderr, "no progress bar in a pipe"
        assert generate(output, mesh) == text
        source = output
    command = [sys.executable, "-m", "launch.convert", f"--inspect={tmp_path / 'meta'}", "--mesh=data:1,model:8"]
    inspected = subprocess.run(command, cwd=launchers.ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert inspected.returncode == 0, inspected.stderr
    assert (
        f"{tmp_path / 'meta'}: Meta\n12 tensors (12 bfloat16), 2,524,672 bytes, 1,000,192 parameters"
        in inspected.stdout
    )
    assert "Each of 8 devices of data:1,model:8 holds 267,776 bytes" in inspected.stdout


def test_tensors_that_the_config_calls_narrower(tmp_path: Path):
    """Nothing is rounded unless --dtype says so."""
    flags = ["--format=hf", "--verify"]
    done = launchers.run("convert", "--checkpoint=demo", f"--output={tmp_path / 'a'}", "--dtype=float32", *flags)
    assert done.stdout.endswith("demo_checkpoint converted to float32.\n"), done
    config = tmp_path / "a" / "config.json"
    config.write_text(config.read_text().replace("float32", "bfloat16"))
    done = launchers.run("convert", f"--checkpoint={tmp_path / 'a'}", f"--output={tmp_path / 'b'}", *flags)
    assert "The config says bfloat16, but the tensors are stored as float32: taking that." in done.stderr
    assert done.stdout.endswith("the same bits as in " + str(tmp_path / "a") + ".\n"), done
    inspected = launchers.run("convert", f"--inspect={tmp_path / 'b'}")
    assert "56 tensors (56 float32), 18,756,608 bytes" in inspected.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint=demo"], "nothing to do: give --output=NEW_FOLDER and --format=hf|meta|orbax, or"),
        (["--checkpoint=demo", "--output=/tmp", "--format=hf"], "/tmp already exists; choose a new folder"),
        (["--output=/tmp/x", "--format=hf"], "no checkpoint: give --checkpoint=FOLDER"),
        (["--checkpoint=demo", "--output=/tmp/x", "--format=hf", "--max_shard_size=5 gigs"], "such as 500MB, 5GB"),
        (["--checkpoint=demo", "--output=/tmp/x", "--format=meta", "--meta_files=3"], "Numbers that can: 1, 2, 4."),
        (["--checkpoint=demo", "--output=/tmp/x", "--format=hf", "--rope_factor=8"], "a rope factor was given, but"),
        (["--inspect=./nowhere"], "nowhere is not a folder"),
        (["--inspect=demo", "--mesh=data:1,model:3"], "Sizes that work: 1, 2, 4, 8."),
    ],
)  # fmt: skip
def test_mistakes(flags: list[str], message: str):
    done = launchers.run("convert", *flags)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not Path("/tmp/x").exists()


def test_a_format_that_is_not_known():
    done = launchers.run("convert", "--checkpoint=demo", "--output=/tmp/x", "--format=gguf")
    assert done.returncode == 1
    assert "should be one of <hf|meta|orbax>" in done.stderr
