"""How two arrays differ."""

import numpy as np

from .contract import distance
from .results import Difference, Worst


def measure(ours: np.ndarray, theirs: np.ndarray, copies: int = 1) -> Difference:
    """Compares two arrays of one shape, value by value. Types may differ.

    `copies`: how often each kv head, on axis 2, is repeated in both; positions name the true head.
    """
    x, y = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    apart = np.abs(x - y)
    worst = None
    if apart.size and not np.all(apart == 0):
        flat = int(np.argmax(apart))  # the first NaN if there is one
        position = tuple(int(i) for i in np.unravel_index(flat, apart.shape))
        values = float(x[position]), float(y[position])
        worst = Worst((*position[:2], position[2] // copies, *position[3:]) if copies > 1 else position, *values)
    max_abs = float(np.max(apart, initial=0.0))
    return Difference(max_abs, distance(x, y), _bit_equal(ours, theirs), worst)


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
