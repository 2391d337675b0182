"""Writes a benchmark's result with what is needed to repeat it: device, versions, command, commit."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..errors import ConfigError

PACKAGES = ("jaxlib", "torch", "transformers", "vllm")  # whose versions a result can depend on
MAX_NAME = 100  # characters


def device_of(mesh: Mesh) -> str:
    """The devices of a mesh in words."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"


def save(
    name: str,
    device: str,
    workload: dict[str, Any],
    results: list[dict[str, Any]],
    folder: str | Path,
    *,
    ceilings: dict[str, Any] | None = None,
    versions: tuple[str, ...] = (),
) -> Path:
    """Writes `results` of a run on `device` (see `device_of`) to folder/NAME.json and returns the path.

    `ceilings` are what the devices could do at best, where that was measured; `versions` names packages of PACKAGES
    that took part. The file is whole or not there. Raises ConfigError when it cannot be written.
    """
    arguments = [a for a in sys.argv[1:] if not a.startswith("--out=")]
    made_by = {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__}
    record = {
        "device": device,
        "versions": made_by | {package: _version(package) for package in versions},
        "command": "python -m " + " ".join([_module_name(), *arguments]),
        "commit": os.environ.get("BENCHMARK_COMMIT") or _commit(),
        "workload": workload,
        "results": results,
    }
    if ceilings is not None:
        record["ceilings"] = ceilings
    path = check_place(name, folder)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{path}: the result cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_place(name: str, folder: str | Path) -> Path:
    """The file of a result. Raises ConfigError, before anything is measured, for a name or folder that cannot be."""
    if not name or len(name) > MAX_NAME or not all(c.isalnum() or c in "._-" for c in name) or name[0] == ".":
        raise ConfigError(f"--name={name[:MAX_NAME]!r}: give letters, digits, '.', '_' and '-', {MAX_NAME} at most.")
    folder = Path(folder).expanduser()
    nearest = next((parent for parent in (folder, *folder.absolute().parents) if parent.exists()), Path("/"))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"--out={folder}: {nearest} is not a folder that can be written to.")
    if (folder / f"{name}.json").is_dir():
        raise ConfigError(f"--out={folder}: {name}.json is a folder there.")
    return folder / f"{name}.json"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _module_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def _commit() -> str:
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return "unknown"
    return git.stdout.strip() or "unknown"
