"""Choosing the next token: what a request asks for, and the sampler that runs on the device."""

from .params import RowParams, SamplingParams, pack_rows
from .sampler import sample

__all__ = ["RowParams", "SamplingParams", "pack_rows", "sample"]
