"""launch/train.py and launch/evaluate.py as a user runs them, on simulated devices."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import launchers
import pytest
import torch
from tiny_model import CONFIG, TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer

from sharded_llama.engine.llm import LLM
from sharded_llama.mesh import make_mesh
from sharded_llama.training.settings import TrainSettings

# Nothing of what configs/demo.py says but its kind of model. No dropout: it takes long to compile.
TRAIN = TrainSettings(
    steps=4, batch=4, length=16, warmup_steps=1, learning_rate=1e-2, eval_every=2, export_dtype="float32"
)
SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_seq_len")
OVERRIDES = [f"--config.model.{name}={getattr(CONFIG, name)}" for name in SIZES]
OVERRIDES += [f"--config.train.{name}={value}" for name, value in dataclasses.asdict(TRAIN).items()]


def start(launcher, *flags):
    return launchers.start(launcher, *flags, without=("NPROC",))  # which the launcher sets itself


def run_without(missing, launcher, *flags):
    """Runs a launcher, as on a machine where the packages `missing` are not installed."""
    program = f"import sys; sys.modules |= dict.fromkeys({missing}); from launch import {launcher}; {launcher}.cli()"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, flags)],
        cwd=launchers.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={k: v for k, v in os.environ.items() if k != "NPROC"},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def train_flags(text, output):
    return ["--config=configs/demo.py", f"--text={text}", f"--output={output}", "--simulate_devices=8", *OVERRIDES]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """The folder of a run, and what it wrote to standard error."""
    output = tmp_path_factory.mktemp("runs") / "run"
    code, out, err = start("train", *train_flags(text, output), "--mesh=data:2,model:4").finish()
    assert (code, out) == (0, ""), err
    return output, err


def test_what_is_said(run):
    _, err = run
    assert "tokens to train on" in err
    assert "step 4: held out" in err
    assert len(err.splitlines()) < 15  # orbax would write hundreds of its own


def test_the_checkpoint_is_one_model_to_transformers_and_to_us(run):
    folder = run[0] / "checkpoint"
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert theirs.dtype == torch.float32
    prompt = tokenizer("7 green bottles", return_tensors="pt")["input_ids"]
    expected = theirs.generate(prompt, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=1)
    llm = LLM(folder, mesh=make_mesh(2, 2), max_num_seqs=16, max_num_batched_tokens=64, progress=False)
    (request,) = llm.generate("7 green bottles", max_tokens=8, ignore_eos=True)
    assert list(request.prompt_token_ids + request.outputs[0].token_ids) == expected[0].tolist()


def test_evaluate_agrees_with_training(run, text):
    """On another mesh, one that repeats kv heads."""
    flags = [f"--checkpoint={run[0] / 'checkpoint'}", f"--text={text}", "--length=16", "--simulate_devices=8"]
    held_out = start("evaluate", *flags, "--holdout=0.1", "--mesh=model:8")
    without = ("optax", "orbax", "matplotlib")
    code, whole, err = run_without(without, "evaluate", *flags, "--mesh=data:4,model:2", "--batch=2")
    assert code == 0, err
    assert f"{len(TEXT.encode())} bytes" in whole
    code, out, err = held_out.finish()
    assert code == 0, err
    best = json.loads((run[0] / "best.json").read_text())
    record = [json.loads(line) for line in (run[0] / "log.jsonl").read_text().splitlines()]
    bits = next(r["heldout_bits_per_byte"] for r in record if r.get("heldout_loss") == best["loss"])
    loss, perplexity, printed_bits = (float(x) for x in re.findall(r"\d+\.\d+", out))
    assert loss == pytest.approx(best["loss"], abs=2e-4)
    assert perplexity == pytest.approx(math.exp(best["loss"]), rel=1e-3)
    assert printed_bits == pytest.approx(bits, abs=2e-4)
    assert f"{len(TEXT[round(len(TEXT) * 0.9) :].encode())} bytes, windows of 16 tokens)" in out


def test_mistakes(run, text, tmp_path):
    """Each gives one line and exit status 1; nothing is written."""
    train = train_flags(text, tmp_path / "run")
    cases = {
        "--checkpoint is not a setting of training": ("train", *train, "--checkpoint=demo"),
        "Sizes that work: 1, 2, 4;": ("train", *train, "--mesh=model:8"),
        "run holds a finished run": ("train", *train_flags(text, run[0])),
        "give --text=FILE, the text to score": ("evaluate", "--checkpoint=demo"),
    }
    results = [process.finish() for process in [start(*arguments) for arguments in cases.values()]]
    messages = [*cases, "training needs orbax: pip install 'sharded-llama[train]'."]
    results.append(run_without(("orbax",), "train", *train))
    for message, (code, out, err) in zip(messages, results, strict=True):
        assert (code, out) == (1, ""), message
        assert err.startswith("error: "), err
        assert message in err
        assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
