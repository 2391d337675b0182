"""A whole measurement: ceilings, the engine started and warm, the mode's rows, and a peer on the same workload."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ..checkpoint import save_weights
from ..config import LlamaConfig
from ..engine.compilation import CompileCounter
from ..engine.llm import LLM
from . import modes, record, single
from .ceilings import CUBE, matmul_rate, measure_ceilings
from .peers import Peer
from .peers.process import run_peer
from .settings import Settings
from .startup import run_child
from .statistics import median

MODES: dict[str, Callable[..., None]] = {
    "latency": modes.latency,
    "throughput": modes.throughput,
    "prefill": modes.prefill,
}
COUNT = "compilations after start"  # what the last row is of


class Measured(NamedTuple):
    """What a measurement gives to its record."""

    rows: list[dict[str, Any]]
    ceilings: dict[str, Any]
    engine: dict[str, int]  # max_model_len, slots
    device: str


def measure(
    settings: Settings,
    config: LlamaConfig,
    mesh: Mesh,
    make: Callable[[], LLM],
    weights_folder: Path | None = None,
) -> Measured:
    """Latency, throughput or prefill of the model that `make` gives.

    transformers as a peer takes turns with the engine, in this process. `weights_folder` is a new folder to which the
    weights are written, for a peer that comes later.
    """
    rows: list[dict[str, Any]] = []
    rng = np.random.default_rng(settings.seed)
    ceilings = measure_ceilings(config, mesh)
    found: dict[str, Any] = ceilings._asdict()
    llm = make()
    llm.start()
    try:
        peer: Peer | None = None
        if settings.peer is not None:
            peer = _open_hf(llm)
            found["matmul"] = _matmul_rates(settings.rounds)
        if weights_folder is not None:
            save_weights(llm.weights, llm.config, weights_folder)
        modes.warm_up(llm.engine, rng)
        counter = CompileCounter()
        MODES[settings.mode](llm.engine, settings, ceilings, peer, rng, rows.append)
        rows.append({"what": COUNT, "count": counter.count})
        engine = {"max_model_len": llm.engine.max_model_len, "slots": single.slots_of(llm.engine)}
    finally:
        llm.shutdown()
    return Measured(rows, found, engine, record.device_of(mesh))


def measure_apart(settings: Settings, command: Sequence[str], device: str) -> tuple[Measured, dict[str, Any]]:
    """`measure` in a process of its own, then the peer in another: each has the accelerator for itself.

    Args:
      command: runs the launcher of this process; it is given --peer_weights, by which it leaves out the peer.
      device: of the peer, "cuda" or "cpu".

    Returns also the workload that the first process recorded. Raises EngineError when one of them fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        more = [f"--peer_weights={weights}", f"--out={folder}", "--name=ours", "--nopicture"]
        found = run_child([*command, *more], Path(folder) / "ours.json")
        workload, rows = found["workload"], found["results"]
        timed = [row for row in rows if row["what"] != COUNT]
        job = {"peer": settings.peer, "folder": str(weights), "dtype": workload["config"]["dtype"], "device": device}
        job |= {"max_model_len": workload["sizes"]["max_model_len"], "max_num_seqs": _most_at_once(workload, timed)}
        job |= {"steps": settings.steps, "rounds": settings.rounds, "rest_ms": settings.rest_ms, "rows": timed}
        compared = run_peer(job)
    rest = [row for row in rows if row["what"] == COUNT]
    return Measured([*compared, *rest], found["ceilings"], workload["sizes"], found["device"]), workload


def _most_at_once(workload: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> int:
    """Sequences that the peer may run at the same time: as many as ours did."""
    return max((row["at_once"] for row in rows if "at_once" in row), default=workload["sizes"]["slots"])


def _open_hf(llm: LLM) -> Peer:
    """transformers with the very same weights, by way of a folder that is gone after."""
    from .peers.hf import HfPeer

    with tempfile.TemporaryDirectory() as folder:
        save_weights(llm.weights, llm.config, Path(folder) / "weights")
        return HfPeer(Path(folder) / "weights", llm.config.dtype)


def _matmul_rates(rounds: int) -> dict[str, float]:
    """FLOPs per second of bare float32 products on this CPU, by JAX and by torch, in turns."""
    from .peers.hf import torch_matmul_rate

    cpu, float32 = jax.devices("cpu")[0], np.dtype(np.float32)
    samplers = [lambda: matmul_rate(cpu, float32), lambda: torch_matmul_rate(CUBE["cpu"])]
    ours, theirs = (median(samples) for samples in single.interleaved(rounds, samplers))
    return {"jax_flops_per_s": ours, "torch_flops_per_s": theirs, "jax_over_torch": ours / theirs}
