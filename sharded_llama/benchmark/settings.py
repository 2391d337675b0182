"""What a benchmark is asked to do, after its flags were read."""

import dataclasses
import math

from .trace import Trace
from .workload import Lengths, Rows

MODES = ("latency", "throughput", "prefill", "load", "startup", "start")
PEERS = ("hf", "vllm")
PEER_MODES = ("latency", "throughput", "prefill")
WAYS = ("async", "engine")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one run of the launcher. Lengths in tokens."""

    mode: str
    batches: tuple[int, ...] | None = None  # latency; None: the usual ones that fit
    context: int | None = None
    input_len: int | None = None
    steps: int = 32  # decode steps of a round
    rounds: int = 5
    requests: tuple[Lengths, ...] = ()  # throughput
    trace: Trace | None = None
    own_arrivals: bool = False  # the trace's
    request_rate: float = math.inf  # per second
    max_concurrency: int | None = None
    concurrencies: tuple[int, ...] = ()
    way: str = "async"  # into the engine
    prefill: tuple[Rows, ...] | None = None
    rest_ms: int = 0  # before each time that prompts are computed
    peer: str | None = None
    seed: int = 0

    @property
    def bounds(self) -> tuple[int | None, ...]:
        """The bounds of requests under way, a run for each."""
        return self.concurrencies or (self.max_concurrency,)
