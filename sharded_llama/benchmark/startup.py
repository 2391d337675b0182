"""How long a start takes, phase by phase: in this process, and in two new ones without and with compiled programs."""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.llm import LLM
from ..errors import EngineError
from ..json_file import read_json_object
from .single import prefill_ms
from .workload import Rows

SECONDS = 1800  # after which a process that starts is given up
FIRST_PROMPT = 16  # tokens
IMPORT, OPEN, OTHER, FIRST = "import", "open", "other", "first token"  # phases that are seen from outside


def start_here(began: float, make: Callable[[], LLM]) -> dict[str, Any]:
    """Seconds of each phase of a start in this process, one after the other.

    Args:
      began: `time.time()` when the process was ready to open the model; until there is an LLM is the phase "open".
      make: gives the model in its mesh, with its weights there or on their way.

    Phases of `LLM.start` are those that the engine reports, and "other". What goes on beside them, such as reading
    weights, is in `beside`.
    """
    llm = make()
    phases = {OPEN: time.time() - began}
    known = dict(llm.phases)
    start = time.perf_counter()
    llm.start()
    started = time.perf_counter()
    of_start = {name: s - known.get(name, 0.0) for name, s in llm.phases.items()}
    phases |= {name: s for name, s in of_start.items() if s > 0}
    phases[OTHER] = max(0.0, started - start - sum(of_start.values()))
    engine = llm.engine
    tokens = min(FIRST_PROMPT, engine.max_model_len - 1)
    prefill_ms(engine, Rows(1, tokens), np.random.default_rng(0))
    phases[FIRST] = time.perf_counter() - started
    row = {"what": "start", "began": began, "phases": phases, "total_s": sum(phases.values())}
    row |= {"beside": {"reading weights": llm.phases.weights_s}, "executables": engine.stats().n_compiled}
    llm.shutdown()
    return row


def start_new_processes(command: Sequence[str]) -> tuple[list[dict[str, Any]], str, dict[str, Any]]:
    """`start_here` in two new processes: with an empty cache, and with what that left. This one must not hold devices.

    `command` runs this launcher in mode "start"; --out and --name are added. Returns the rows, with the time until the
    process was ready to open the model as the phase "import", the device and the workload. Raises EngineError when a
    process fails.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"XDG_CACHE_HOME": folder}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # it would win
        # Checkpoints of the hub stay where they are.
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        environment.setdefault("HF_HOME", str(cache / "huggingface"))
        for name in ("cold", "warm"):
            spawned = time.time()
            found = run_child(
                [*command, f"--out={folder}", f"--name={name}"], Path(folder) / f"{name}.json", environment
            )
            (row,) = found["results"]
            row["phases"] = {IMPORT: row.pop("began") - spawned, **row["phases"]}
            row["total_s"] = sum(row["phases"].values())
            rows.append(row | {"what": "startup", "cache": name})
    return rows, found["device"], found["workload"]


def run_child(command: Sequence[str], result: Path, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs this launcher in a new process and reads what it wrote. Raises EngineError when it fails."""
    try:
        done = subprocess.run(command, env=environment, check=False, timeout=SECONDS, stdout=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise EngineError(f"a process that measures was given up after {SECONDS} seconds.") from None
    if done.returncode:
        raise EngineError(f"a process that measures ended with status {done.returncode}; its messages are above.")
    return read_json_object(result, EngineError)
