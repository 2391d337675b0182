"""Text to batches of token ids, each a pure function of its arguments: a resumed run goes on exactly."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ..errors import TrainingError
from ..sharding import named_sharding
from ..tokenizer import Tokenizer


class TokenizedText(NamedTuple):
    """A text as token ids, without BOS."""

    ids: np.ndarray  # (T,) int32
    n_bytes: int  # length of the text in UTF-8


class Batch(NamedTuple):
    """Windows of a text. The target of a token is the one after it; BOS stands before a window's first."""

    tokens_BL: jax.Array | np.ndarray  # int32
    targets_BL: jax.Array | np.ndarray  # int32
    valid_BL: jax.Array | np.ndarray  # bool: which targets count


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, byte for byte: line endings stay. Raises TrainingError when it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error


def split_text(text: str, holdout: float) -> tuple[str, str]:
    """The training part and the held-out part: the last `holdout` (a fraction) of the characters."""
    cut = round(len(text) * (1 - holdout))
    return text[:cut], text[cut:]


def tokenize(tokenizer: Tokenizer, text: str) -> TokenizedText:
    """Token ids of `text`. Special tokens written in it are encoded as the plain text they are."""
    return TokenizedText(np.asarray(tokenizer.encode(text), np.int32), len(text.encode("utf-8")))


def training_batch(ids: np.ndarray, step: int, *, seed: int, batch: int, length: int, bos_id: int) -> Batch:
    """The windows of a step: `batch` random stretches of `length` ids, each after BOS.

    A pure function of (seed, step). Raises TrainingError when the text is shorter than a window.
    """
    if len(ids) < length:
        raise TrainingError(
            f"the text to train on has {len(ids)} tokens, but a window {length}: use a longer text or "
            f"--config.train.length={len(ids)} at most."
        )
    first_B = np.random.default_rng([seed, step]).integers(0, len(ids) - length + 1, batch)
    targets_BL = ids[first_B[:, None] + np.arange(length)]
    return Batch(_after_bos(targets_BL, bos_id), targets_BL, np.ones_like(targets_BL, bool))


def evaluation_batches(ids: np.ndarray, *, batch: int, length: int, bos_id: int) -> Iterator[Batch]:
    """The text in consecutive windows, each after BOS: every token is the target of exactly one.

    All batches have one shape; what goes beyond the text is not valid.
    """
    n_batches = -(-len(ids) // (batch * length))
    size = n_batches * batch * length
    shape = (n_batches, batch, length)
    targets = np.pad(ids, (0, size - len(ids)), constant_values=bos_id).reshape(shape)
    valid = (np.arange(size) < len(ids)).reshape(shape)
    for targets_BL, valid_BL in zip(targets, valid, strict=True):
        yield Batch(_after_bos(targets_BL, bos_id), targets_BL, valid_BL)


def _after_bos(targets_BL: np.ndarray, bos_id: int) -> np.ndarray:
    return np.concatenate([np.full_like(targets_BL[:, :1], bos_id), targets_BL[:, :-1]], axis=1)


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """A host batch, the same in every process, as global arrays split over `data`."""
    sharding = named_sharding(mesh, "tokens")
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)
