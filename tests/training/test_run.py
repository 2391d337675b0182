"""Whole runs in one process: interrupted and resumed, the best weights kept, and what is refused."""

import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_model import CONFIG, SETTINGS, TEXT, compiled_step, random_state

from sharded_llama.errors import TokenizerError, TrainingError
from sharded_llama.mesh import make_mesh
from sharded_llama.training import loop, report
from sharded_llama.training.checkpointing import StateStore
from sharded_llama.training.evaluation import Score
from sharded_llama.training.run_folder import RunFolder
from sharded_llama.training.tokenizer import train_tokenizer

PLAIN = dataclasses.replace(SETTINGS, dropout=0.0, export_dtype="float32")
CHECKPOINT_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


MESH = (1, 2)


@pytest.fixture(autouse=True, scope="module")
def compile_once():
    """Runs start from the same weights with the same compiled step; test_train_launchers.py has the real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "init_train_state", lambda *_: random_state(MESH))
        patch.setattr(loop, "make_train_step", lambda config, settings, _: compiled_step(config, settings, MESH))
        yield


def train(text, output, settings=PLAIN, config=CONFIG, **kwargs):
    return loop.train(config, settings, text, output, mesh=make_mesh(*MESH), **kwargs)


def log_of(output):
    return [{k: v for k, v in record.items() if k != "tokens_per_s"} for record in report.read(output / "log.jsonl")]


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "new" / "run"
    assert train(text, output) == output / "checkpoint"
    return output


def interrupt(*_):
    raise KeyboardInterrupt


def interrupt_after_saving(monkeypatch, step):
    save = StateStore.save

    def interrupted(self, state):
        save(self, state)
        if int(state.step) == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(StateStore, "save", interrupted)


def test_what_a_run_leaves(finished):
    assert {p.name for p in finished.iterdir()} == {
        *("run.json", "tokenizer", "state", "log.jsonl", "loss.png", "best.json", "checkpoint")
    }
    assert {p.name for p in (finished / "checkpoint").iterdir()} == CHECKPOINT_FILES
    assert {p.name for p in (finished / "state").iterdir()} == {"3", "6"}
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_log(finished):
    log = report.read(finished / "log.jsonl")
    steps, evaluations = [r for r in log if "loss" in r], [r for r in log if "heldout_loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in evaluations] == [2, 4, 6]
    assert all(math.isfinite(x) and x > 0 for r in log for x in r.values())
    assert steps[0].keys() == {"step", "loss", "grad_norm", "tokens_per_s"}
    best = json.loads((finished / "best.json").read_text())
    assert best["loss"] == min(r["heldout_loss"] for r in evaluations)


def test_an_interrupted_run_ends_like_an_uninterrupted_one(finished, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after_saving(patch, step=3)
        with pytest.raises(KeyboardInterrupt):
            train(text, tmp_path)
    assert not (tmp_path / "checkpoint").exists()
    with (tmp_path / "log.jsonl").open("a") as log:  # steps whose state was never saved, and half a line
        log.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
    train(text, tmp_path)
    assert log_of(tmp_path) == log_of(finished)
    for name in CHECKPOINT_FILES:
        assert (tmp_path / "checkpoint" / name).read_bytes() == (finished / "checkpoint" / name).read_bytes()


def test_a_run_that_was_stopped_at_the_very_end_is_finished(finished, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after_saving(patch, step=6)
        with pytest.raises(KeyboardInterrupt):
            train(text, tmp_path)
    train(text, tmp_path)
    assert log_of(tmp_path) == log_of(finished)
    assert {p.name for p in (tmp_path / "checkpoint").iterdir()} == CHECKPOINT_FILES


def test_a_run_without_a_saved_state_starts_again(finished, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(report, "plot", interrupt)  # at the first evaluation
        (tmp_path / "other").write_text("Another text, and so another tokenizer. " * 50)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "other", tmp_path / "run")
    train(text, tmp_path / "run")
    assert log_of(tmp_path / "run") == log_of(finished)


def test_the_best_weights_are_exported(text, tmp_path, monkeypatch):
    losses, seen = iter([3.0, 1.0, 2.0]), []

    def score(weights, *_, **__):
        seen.append(np.asarray(weights.norm))
        return Score(next(losses), 1, 1)

    monkeypatch.setattr(loop, "score_text", score)
    checkpoint = train(text, tmp_path)
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 4
    exported = load_file(checkpoint / "model.safetensors")["model.norm.weight"]
    np.testing.assert_array_equal(exported, seen[1])
    assert not np.array_equal(exported, seen[2])
    assert not list(tmp_path.glob("best-*"))


def test_a_finished_run_is_not_overwritten(finished, text):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    with pytest.raises(TrainingError, match=r"run holds a finished run .*: choose another --output"):
        train(text, finished)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


@pytest.fixture(scope="module")
def unfinished(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "unfinished"
    shutil.copytree(finished, folder)
    (folder / "checkpoint").rename(folder / "best-6")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": dataclasses.replace(PLAIN, steps=7)}, "train.steps was 6, now 7."),
        ({"config": CONFIG.replace(rope_theta=5e5)}, "model.rope_theta was 10000.0, now 500000.0."),
    ],
    ids=["settings", "model"],
)
def test_a_run_is_not_resumed_with_other_settings(unfinished, text, changes, message):
    with pytest.raises(TrainingError, match=f"unfinished holds an unfinished run with other .*{re.escape(message)}"):
        train(text, unfinished, **changes)


def test_a_run_is_not_resumed_on_another_text(unfinished, text, tmp_path):
    (tmp_path / "text").write_text(TEXT + "!")
    with pytest.raises(TrainingError, match=r"text was '[0-9a-f]{64}', now '[0-9a-f]{64}'"):
        train(tmp_path / "text", unfinished)


def test_how_often_to_save_may_change(unfinished, text, tmp_path):
    folder = shutil.copytree(unfinished, tmp_path / "run")
    RunFolder(folder).claim(CONFIG, dataclasses.replace(PLAIN, save_every=1, eval_every=1), TEXT, None)


def test_other_folders_are_left_alone(text, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for output in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(TrainingError, match="exists and is not the folder of a training run"):
            train(text, output)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_given_tokenizer(text, tmp_path):
    train_tokenizer("other text", tmp_path / "mine", 264)
    checkpoint = train(text, tmp_path / "run", tokenizer=tmp_path / "mine")
    assert (checkpoint / "tokenizer.json").read_bytes() == (tmp_path / "mine/tokenizer.json").read_bytes()
    assert not (tmp_path / "run/tokenizer").exists()


def test_a_tokenizer_of_another_model(text, tmp_path):
    train_tokenizer(TEXT, tmp_path / "large", 300)
    with pytest.raises(TrainingError, match="has 300 tokens, but the model's vocab_size is only 264"):
        train(text, tmp_path / "a", tokenizer=tmp_path / "large")
    with pytest.raises(TrainingError, match="BOS is 0, but the model's 5"):
        train(text, tmp_path / "b", config=CONFIG.replace(bos_id=5))
    with pytest.raises(TokenizerError, match="nowhere is not a folder"):
        train(text, tmp_path / "c", tokenizer=tmp_path / "nowhere")


def test_a_text_that_is_too_short(tmp_path):
    (tmp_path / "text").write_text("short")
    with pytest.raises(TrainingError, match="text has 5 characters: too few to hold out 1%"):
        train(tmp_path / "text", tmp_path / "a", dataclasses.replace(PLAIN, holdout=0.01))
    with pytest.raises(TrainingError, match=r"has \d tokens, but a window 16"):
        train(tmp_path / "text", tmp_path / "b", dataclasses.replace(PLAIN, holdout=0.3))


def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path, monkeypatch):
    def broken(*_):
        return lambda state, _: (state, {"loss": np.float32("nan"), "grad_norm": 1.0})

    monkeypatch.setattr(loop, "make_train_step", broken)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1\. .* lower learning_rate than 0.01"):
        train(text, tmp_path / "run")
    assert not list((tmp_path / "run/state").iterdir())
