"""Other engines on the same workload: what is asked of one, and how its times join ours."""

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ...errors import ConfigError
from ..statistics import median

PACKAGES = {"hf": ("torch", "transformers"), "vllm": ("vllm",)}
PIP = {"hf": "'sharded-llama[parity]'", "vllm": "vllm"}


class Peer(Protocol):
    """Another engine that holds the same weights. Lengths in tokens."""

    def decode_sampler(self, batch: int, context: int, steps: int) -> Callable[[], float]:
        """Gives milliseconds of a greedy decode step, over `steps` steps around `context` positions of each row."""

    def prefill_ms(self, rows: int, tokens: int) -> float:
        """Milliseconds from prompts on the host to their first tokens on it."""

    def generate_s(self, n: int, n_in: int, n_out: int, concurrency: int) -> float:
        """Seconds of n requests, at most `concurrency` of them at a time."""


def check_installed(peer: str) -> None:
    """Raises ConfigError when a package of this peer is missing. Imports none of them."""
    for package in PACKAGES[peer]:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"--peer={peer} needs the package {package}: pip install {PIP[peer]}.")


def with_peer(row: Mapping[str, Any], name: str, samples: Sequence[float]) -> dict[str, Any]:
    """A row with a peer's time, in the row's unit, and how many times as fast as it ours is: theirs over ours."""
    unit = "ms" if "ms" in row else "seconds"
    theirs = median(samples)
    return {
        **row,
        f"{name}_{unit}": theirs,
        f"{name}_samples": list(samples),
        "speed_ours_over_peer": theirs / row[unit],
    }


def complete(
    rows: Sequence[Mapping[str, Any]], name: str, peer: Peer, *, steps: int, rounds: int, rest_ms: int
) -> list[dict[str, Any]]:
    """Runs the workload of every row through the peer, each once to warm up, and adds what it took.

    rest_ms: milliseconds of rest before each time that prompts are computed.
    """
    return [with_peer(row, name, _samples(row, peer, steps, rounds, rest_ms)) for row in rows]


def _samples(row: Mapping[str, Any], peer: Peer, steps: int, rounds: int, rest_ms: int) -> list[float]:
    if row["what"] == "decode":
        sample = peer.decode_sampler(row["batch"], round(row["context"]), steps)
    elif row["what"] in ("ttft", "prefill"):

        def sample() -> float:
            time.sleep(rest_ms / 1e3)
            return peer.prefill_ms(row["rows"], row["tokens"])
    else:
        lengths = (row[field] for field in ("requests", "input_len", "output_len", "at_once"))
        return [peer.generate_s(*lengths)]
    sample()
    return [sample() for _ in range(rounds)]
