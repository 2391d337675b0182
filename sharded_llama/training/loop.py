"""A whole training run: from a text file to a checkpoint, through as many interruptions as it takes."""

import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm

from ..config import LlamaConfig
from ..errors import TrainingError
from ..mesh import broadcast_from_main
from ..tokenizer import Tokenizer, load_tokenizer
from . import report
from .checkpointing import StateStore
from .data import TokenizedText, put_batch, read_text, split_text, tokenize, training_batch
from .evaluation import score_text
from .run_folder import RunFolder
from .settings import TrainSettings
from .step import (
    ATTENTION,
    TrainState,
    TrainStep,
    abstract_train_state,
    cast_weights,
    check_trainable,
    init_train_state,
    make_train_step,
)
from .tokenizer import train_tokenizer

LOG_SECONDS = 30  # between progress lines where there is no terminal


class _Run(NamedTuple):
    """What stays the same from the first step to the last."""

    folder: RunFolder
    config: LlamaConfig
    settings: TrainSettings
    mesh: Mesh
    tokenizer: Path
    bos_id: int
    text: TokenizedText
    heldout: TokenizedText


def train(
    config: LlamaConfig,
    settings: TrainSettings,
    text_file: Path,
    output: Path,
    *,
    mesh: Mesh,
    tokenizer: Path | None = None,
) -> Path:
    """Trains a model of `config` on a text and returns the folder of the exported checkpoint, `output/checkpoint`.

    The exported weights are those with the lowest loss on the held-out end of the text. An unfinished run in
    `output` is resumed where its last state was saved, exactly. Weights are trained in float32.

    Args:
      config: the model; its vocab_size is that of the tokenizer.
      text_file: UTF-8 text.
      output: folder of the run, new or unfinished; see `run_folder` for what is in it.
      tokenizer: folder of a tokenizer to use; default: one is trained on the training part of the text.

    Raises TrainingError, MeshError or TokenizerError, naming what is wrong, before the first step; TrainingError
    when the loss is no longer finite.
    """
    config = config.replace(dtype="float32")
    check_trainable(config, settings, mesh)
    run = _prepare(config, settings, text_file, RunFolder(output), mesh, tokenizer)
    store = StateStore(run.folder.state)
    try:
        _run_steps(run, store)
    finally:
        store.close()
    if jax.process_index() == 0:
        run.folder.finish()
        logging.info("Exported %s.", run.folder.checkpoint)
    return run.folder.checkpoint


def _prepare(
    config: LlamaConfig, settings: TrainSettings, text_file: Path, folder: RunFolder, mesh: Mesh, given: Path | None
) -> _Run:
    """Checks and claims the folder, trains the tokenizer and tokenizes the text."""
    text = read_text(text_file)
    parts = split_text(text, settings.holdout)
    if not all(parts):
        raise TrainingError(f"{text_file} has {len(text)} characters: too few to hold out {settings.holdout:.0%}.")

    def claim() -> None:
        if given is not None:
            load_tokenizer(given)
        folder.claim(config, settings, text, given)
        if given is None and not folder.tokenizer.is_dir():
            train_tokenizer(parts[0], folder.tokenizer, config.vocab_size)

    broadcast_from_main(claim)  # the others read what the first process has written
    tokenizer_folder = given or folder.tokenizer
    tokenizer = load_tokenizer(tokenizer_folder)
    bos_id = _check_tokenizer(tokenizer, tokenizer_folder, config)
    train_text, heldout = (tokenize(tokenizer, part) for part in parts)
    logging.info("%d tokens to train on, %d held out", len(train_text.ids), len(heldout.ids))
    return _Run(folder, config, settings, mesh, tokenizer_folder, bos_id, train_text, heldout)


def _check_tokenizer(tokenizer: Tokenizer, folder: Path, config: LlamaConfig) -> int:
    """The id that starts every window. Raises TrainingError when the model is not made for this tokenizer."""
    if tokenizer.vocab_size > config.vocab_size:
        raise TrainingError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocab_size is only "
            f"{config.vocab_size}."
        )
    if tokenizer.bos_id is None or tokenizer.bos_id != config.bos_id:
        raise TrainingError(f"{folder}: the tokenizer's BOS is {tokenizer.bos_id}, but the model's {config.bos_id}.")
    if tokenizer.vocab_size < config.vocab_size:
        logging.warning("the tokenizer has %d of %d tokens", tokenizer.vocab_size, config.vocab_size)
    return tokenizer.bos_id


def _start(run: _Run, store: StateStore) -> TrainState:
    """The state to go on from. The log is cut back to it."""
    if store.latest_step is None:
        state = init_train_state(run.config, run.settings, run.mesh)
    else:
        state = store.restore(abstract_train_state(run.config, run.settings, run.mesh))
        logging.info("resumed after step %d", int(state.step))
    if jax.process_index() == 0:
        report.truncate(run.folder.log, int(state.step))
    return state


def _run_steps(run: _Run, store: StateStore) -> None:
    settings, writer = run.settings, jax.process_index() == 0
    state = _start(run, store)
    train_step = make_train_step(run.config, settings, run.mesh)
    best_loss = broadcast_from_main(run.folder.best_loss)
    terminal = writer and sys.stderr.isatty()
    told = time.perf_counter()
    done = int(state.step)
    with tqdm(initial=done, total=settings.steps, unit="step", disable=not terminal) as bar:
        for step in range(done + 1, settings.steps + 1):
            state, record = _step(run, train_step, state, step)
            if writer:
                report.append(run.folder.log, **record)
            progress = {"loss": f"{record['loss']:.3f}", "tokens/s": f"{record['tokens_per_s']:,.0f}"}
            bar.set_postfix(progress)
            bar.update()
            if not terminal and time.perf_counter() - told > LOG_SECONDS:
                told = time.perf_counter()
                logging.info("step %d of %d: %s", step, settings.steps, progress)
            last = step == settings.steps
            if last or step % settings.eval_every == 0:
                best_loss = min(best_loss, _evaluate(run, state, best_loss))
            # After the evaluation: of a saved state, everything before it is done.
            if last or step % settings.save_every == 0:
                store.save(state)


def _step(run: _Run, train_step: TrainStep, state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
    """Runs step number `step`; returns the new state and the step's line in the log."""
    start, s = time.perf_counter(), run.settings
    batch = training_batch(run.text.ids, step, seed=s.seed, batch=s.batch, length=s.length, bos_id=run.bos_id)
    state, metrics = train_step(state, put_batch(batch, run.mesh))
    record = {"step": step} | {name: float(value) for name, value in metrics.items()}
    if not math.isfinite(record["loss"]):
        raise TrainingError(
            f"the loss is {record['loss']} at step {step}. Train in a new folder with a lower learning_rate than "
            f"{s.learning_rate} or a longer warm-up than {s.warmup_steps} steps."
        )
    return state, record | {"tokens_per_s": s.batch * s.length / (time.perf_counter() - start)}


def _evaluate(run: _Run, state: TrainState, best_loss: float) -> float:
    """The held-out loss of `state`, logged, drawn, and exported where it is the lowest yet."""
    s, step = run.settings, int(state.step)
    score = score_text(
        cast_weights(state.weights, s.compute_dtype),
        run.config.replace(dtype=s.compute_dtype),
        run.heldout,
        mesh=run.mesh,
        batch=s.batch,
        length=s.length,
        bos_id=run.bos_id,
        backend=ATTENTION,
    )
    logging.info("step %d: held out %.4f nats per token, %.4f bits per byte", step, score.loss, score.bits_per_byte)
    if jax.process_index() == 0:
        report.append(run.folder.log, step=step, heldout_loss=score.loss, heldout_bits_per_byte=score.bits_per_byte)
        report.plot(report.read(run.folder.log), run.folder.plot)
    if score.loss < best_loss:
        run.folder.keep_best(state.weights, run.config.replace(dtype=s.export_dtype), run.tokenizer, step, score.loss)
    return score.loss
