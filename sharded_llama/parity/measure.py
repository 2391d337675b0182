"""How two arrays differ."""

from collections.abc import Iterator

import numpy as np

from .results import Difference, Worst

CHUNK = 1 << 22  # values that are converted to float64 at a time


def distance(x: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over norm of the reference, in float64; NaN unless all values of both are finite."""
    error = norm = 0.0
    for a, b in _chunks(x, reference):
        error += float(np.sum((a - b) ** 2))
        norm += float(np.sum(b**2))
    if not np.isfinite(error + norm):
        return float("nan")
    return 0.0 if error == 0 else error**0.5 / norm**0.5 if norm else float("inf")


def measure(ours: np.ndarray, theirs: np.ndarray, copies: int = 1, rows: int | None = None) -> Difference:
    """Compares two arrays of one shape, value by value. Types may differ.

    `copies`: how often each kv head, on axis 2, is repeated in both; positions name the true head. `rows`: rows beyond
    this many repeat the first one, and are called 0.
    """
    max_abs, flat, start = 0.0, None, 0
    for a, b in _chunks(ours, theirs):
        apart = np.abs(a - b)
        largest = int(np.argmax(apart))  # the first NaN if there is one
        if apart[largest] > max_abs or (np.isnan(apart[largest]) and not np.isnan(max_abs)):
            max_abs, flat = float(apart[largest]), start + largest
        start += len(apart)
    worst = None
    if flat is not None:
        position = tuple(int(i) for i in np.unravel_index(flat, ours.shape))
        values = float(ours[position]), float(theirs[position])
        if copies > 1:
            position = (*position[:2], position[2] // copies, *position[3:])
        if rows is not None and position[0] >= rows:
            position = (0, *position[1:])
        worst = Worst(position, *values)
    return Difference(max_abs, distance(ours, theirs), _bit_equal(ours, theirs), worst)


def _chunks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Parts of flattened arrays in float64."""
    flat = [np.asarray(x).reshape(-1) for x in arrays]
    for start in range(0, flat[0].size, CHUNK):
        yield tuple(x[start : start + CHUNK].astype(np.float64) for x in flat)


def _bit_equal(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of values with equal bits; of equal values where the types differ."""
    if ours.dtype == theirs.dtype:
        bits = f"u{ours.dtype.itemsize}"
        ours, theirs = (np.ascontiguousarray(x).view(bits) for x in (ours, theirs))
    return float(np.mean(ours == theirs)) if ours.size else 1.0


def kl_divergence(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """KL(softmax(theirs) || softmax(ours)) over the last axis, in nats and float64."""
    p, q = _log_softmax(theirs), _log_softmax(ours)
    return np.maximum(np.sum(np.exp(p) * (p - q), axis=-1), 0.0)  # rounding may make it slightly negative


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = np.asarray(logits, np.float64)
    x = x - np.max(x, axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def top_k_agreement(ours: np.ndarray, theirs: np.ndarray, k: int) -> float:
    """Mean share of the reference's k most likely tokens that are among our k most likely ones."""
    k = min(k, ours.shape[-1])
    a, b = (np.argsort(-np.asarray(x, np.float64), axis=-1, kind="stable")[..., :k] for x in (ours, theirs))
    return float(np.mean(np.any(a[..., :, None] == b[..., None, :], axis=-2)))
