"""The sampling parameters of a step's rows, as arrays."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .params import SamplingParams


class RowParams(NamedTuple):
    """What differs from row to row; arrays of the host or of the device."""

    temperature_R: Any  # float32; 0: greedy
    top_k_R: Any  # int32; 0: all
    top_p_R: Any  # float32
    min_p_R: Any  # float32
    presence_R: Any  # float32
    frequency_R: Any  # float32
    repetition_R: Any  # float32
    seed_R2: Any  # uint32, high and low word


def pack_rows(params: Sequence[SamplingParams], seeds: Sequence[int] | None = None) -> RowParams:
    """NumPy arrays of the rows' parameters. seeds: of the rows, in place of the parameters' own."""

    def floats(name: str) -> np.ndarray:
        return np.array([getattr(p, name) for p in params], np.float32)

    seeds = [int(s) % 2**64 for s in (seeds or [p.seed for p in params])]
    return RowParams(
        temperature_R=floats("temperature"),
        top_k_R=np.array([max(0, p.top_k) for p in params], np.int32),
        top_p_R=floats("top_p"),
        min_p_R=floats("min_p"),
        presence_R=floats("presence_penalty"),
        frequency_R=floats("frequency_penalty"),
        repetition_R=floats("repetition_penalty"),
        seed_R2=np.array([(s >> 32, s & 0xFFFFFFFF) for s in seeds], np.uint32).reshape(-1, 2),
    )
