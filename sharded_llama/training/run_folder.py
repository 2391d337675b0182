"""What a run leaves on disk, and the rules of resuming it.

    run.json         the model, the settings and the text: a run is resumed only with the same ones
    tokenizer/       trained on the training part of the text, unless another was given
    state/           the last training states (`checkpointing`)
    log.jsonl        loss.png  (`report`)
    best.json        which best-STEP/ is the checkpoint with the lowest held-out loss so far
    checkpoint/      that checkpoint, at the end

Nothing that was saved is overwritten by another run.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax

from ..checkpoint import save_weights
from ..config import LlamaConfig
from ..errors import TrainingError
from ..json_file import read_json_object
from ..weights import XfmrWeights
from .settings import TrainSettings

FREE = ("train.eval_every", "train.save_every")  # settings that may differ when resuming


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of a run's folder. Only the main process writes, apart from the state and the exported weights."""

    path: Path

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    def claim(self, config: LlamaConfig, settings: TrainSettings, text: str, tokenizer: Path | None) -> None:
        """Makes the folder that of this run, or finds it to be that of the same run, unfinished.

        Raises TrainingError when the folder holds a finished run, the saved states of a run with other settings, or
        something else.
        """
        record, file = self.path / "run.json", {}
        if self.checkpoint.exists():
            raise TrainingError(f"{self.path} holds a finished run ({self.checkpoint}): choose another --output.")
        if record.exists():
            file = read_json_object(record, TrainingError)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise TrainingError(f"{self.path} exists and is not the folder of a training run: choose another --output.")
        identity = {
            "model": dataclasses.asdict(config),
            "train": dataclasses.asdict(settings),
            "text": _sha256(text.encode("utf-8")),
            "tokenizer": tokenizer and _sha256((tokenizer / "tokenizer.json").read_bytes()),
        }
        if self.state.is_dir() and any(self.state.iterdir()):
            self._check_same(file, json.loads(json.dumps(identity)))
            return
        # Nothing was saved yet: the run starts from the beginning.
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be made: {error.strerror or error}.") from error
        for leftover in (self.tokenizer, *self.path.glob("best*"), self.log):
            _remove(leftover)
        _write_json(record, identity)

    def _check_same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        old, new = _flatten(before), _flatten(now)
        changed = [name for name in old | new if name not in FREE and old.get(name) != new.get(name)]
        if changed:
            what = "; ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in changed)
            raise TrainingError(
                f"{self.path} holds an unfinished run with other settings: {what}. Resume it with the same settings, "
                "or choose another --output."
            )

    def best_loss(self) -> float:
        """The lowest held-out loss so far, in nats per token; infinite when there is none."""
        try:
            best = json.loads((self.path / "best.json").read_text())
        except FileNotFoundError:
            return math.inf
        return best["loss"] if (self.path / best["folder"]).is_dir() else math.inf

    def keep_best(self, weights: XfmrWeights, config: LlamaConfig, tokenizer: Path, step: int, loss: float) -> None:
        """Exports the weights in `config.dtype` in place of the best ones so far. Every process must call this."""
        folder = self.path / f"best-{step}"
        if jax.process_index() == 0:
            _remove(folder)
        save_weights(weights, config, folder, tokenizer_folder=tokenizer)
        if jax.process_index() == 0:
            _write_json(self.path / "best.json", {"step": step, "loss": loss, "folder": folder.name})
            for other in self.path.glob("best-*"):
                if other != folder:
                    _remove(other)

    def finish(self) -> None:
        """Makes the best checkpoint the run's result."""
        best = read_json_object(self.path / "best.json", TrainingError)
        (self.path / best["folder"]).rename(self.checkpoint)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 5}} to {"train.steps": 5}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes under another name first, so that the file is whole or as it was."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, file)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
