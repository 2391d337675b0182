"""Choosing the next token: what a request asks for, and the sampler that runs on the device."""

from .params import MAX_LOGPROBS, SamplingParams
from .rows import RowParams, pack_rows
from .sampler import Mode, Sampled, log_normalizer, mode_of, sample
from .slots import SlotSampling

__all__ = [
    "MAX_LOGPROBS",
    "Mode",
    "RowParams",
    "Sampled",
    "SamplingParams",
    "SlotSampling",
    "log_normalizer",
    "mode_of",
    "pack_rows",
    "sample",
]
