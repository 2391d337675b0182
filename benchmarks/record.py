"""Writes a benchmark's result with what is needed to repeat it: device, versions, command, commit."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

RESULTS = Path(__file__).parent / "results"


def save(
    name: str, mesh: Mesh, workload: dict[str, Any], results: list[dict[str, Any]], folder: str | None = None
) -> Path:
    """Writes `results` of a run on `mesh` to benchmarks/results/NAME.json (or to `folder`) and returns the path."""
    arguments = [a for a in sys.argv[1:] if not a.startswith("--out=")]
    record = {
        "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
        "command": "python -m " + " ".join([_module_name(), *arguments]),
        "commit": os.environ.get("BENCHMARK_COMMIT") or _commit(),
        "workload": workload,
        "results": results,
    }
    path = Path(folder or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _module_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def _commit() -> str:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"
