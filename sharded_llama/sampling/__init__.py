"""Choosing the next token: what a request asks for, and the sampler that runs on the device."""

from .params import MAX_LOGPROBS, RowParams, SamplingParams, pack_rows
from .sampler import Sampled, log_normalizer, sample

__all__ = ["MAX_LOGPROBS", "RowParams", "Sampled", "SamplingParams", "log_normalizer", "pack_rows", "sample"]
