"""The `(data, model)` device mesh and the start of multi-process runs."""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from .config import LlamaConfig
from .errors import MeshError, RequestError
from .sharding import DATA, MODEL, check_model_size, model_sizes

# Simulated CPU devices share one thread pool that is sized from the core count. With too few threads, queued
# steps wait for one another inside an all-reduce and never finish; the pool honours this variable.
SIMULATED_NPROC = "16"


def make_mesh(data: int = 1, model: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of the first `data * model` devices with axes ('data', 'model').

    Neighbouring devices share a `model` group, so that tensor parallelism stays within a host where it fits.
    Raises MeshError when there are fewer devices.
    """
    if data < 1 or model < 1:
        raise MeshError(f"mesh data:{data},model:{model}: both sizes must be at least 1.")
    devices = list(jax.devices() if devices is None else devices)
    if data * model > len(devices):
        raise MeshError(
            f"mesh data:{data},model:{model} needs {data * model} devices, but there are {len(devices)} "
            f"({devices[0].platform}). Use a smaller mesh, or simulate devices on CPU with "
            f"--simulate_devices={data * model}."
        )
    idle = {d.process_index for d in devices} - {d.process_index for d in devices[: data * model]}
    if idle:
        raise MeshError(
            f"mesh data:{data},model:{model} uses {data * model} of {len(devices)} devices and leaves process "
            f"{min(idle)} without one: use all devices, or start fewer processes."
        )
    if devices[0].platform == "cpu" and data * model > 1 and _pool_threads() < int(SIMULATED_NPROC):
        logging.warning(
            "simulated devices with fewer than %s threads may hang in queued steps: make them with "
            "simulate_cpu_devices, or set NPROC=%s before JAX starts.",
            SIMULATED_NPROC,
            SIMULATED_NPROC,
        )
    grid = np.asarray(devices[: data * model], dtype=object).reshape(data, model)
    return Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def hopper_processors(device: jax.Device) -> int:
    """Processors of an NVIDIA GPU of the Hopper generation, which has instructions that no other one has; else 0."""
    if device.platform != "gpu" or getattr(device, "compute_capability", None) != "9.0":
        return 0
    return getattr(device, "core_count", 132)  # 132: of an H100 or H200


def _pool_threads() -> int:
    """Threads that JAX's CPU devices share."""
    nproc = os.environ.get("NPROC", "")
    return int(nproc) if nproc.isdigit() else os.cpu_count() or 1


def default_mesh(config: LlamaConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices: as many on `model` as the heads allow within one host, the rest on `data`."""
    devices = list(jax.devices() if devices is None else devices)
    per_host = min(len(devices), max(1, sum(d.process_index == devices[0].process_index for d in devices)))
    model = max(m for m in model_sizes(config) if m <= per_host and len(devices) % m == 0)
    return make_mesh(len(devices) // model, model, devices=devices)


def parse_mesh(text: str) -> dict[str, int]:
    """Reads `data:2,model:4` into {'data': 2, 'model': 4}; an axis left out is 1."""
    sizes = {DATA: 1, MODEL: 1}
    for part in filter(None, text.replace(" ", "").split(",")):
        axis, _, size = part.partition(":")
        if axis not in sizes or not size.isdigit() or int(size) < 1:
            raise MeshError(f"mesh {text!r}: expected sizes such as data:2,model:4, got {part!r}.")
        sizes[axis] = int(size)
    return sizes


def check_mesh(config: LlamaConfig, mesh: Mesh) -> None:
    """Raises MeshError when `mesh` is not a (data, model) mesh or its model size does not fit the heads."""
    if tuple(mesh.axis_names) != (DATA, MODEL):
        raise MeshError(f"the mesh's axes are {tuple(mesh.axis_names)}; make it with make_mesh(data, model).")
    check_model_size(config, mesh.shape[MODEL])


def simulate_cpu_devices(count: int) -> None:
    """Makes JAX show `count` CPU devices. Call before JAX touches its devices."""
    os.environ.setdefault("NPROC", SIMULATED_NPROC)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def start_distributed(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins this process to the others of a multi-process run.

    With no argument given nothing happens: one process. On clusters that JAX knows (Slurm, Cloud TPU, ...)
    `coordinator_address='auto'` finds the others.
    """
    given = [x is not None for x in (coordinator_address, num_processes, process_id)]
    if not any(given):
        return
    if coordinator_address == "auto":
        _initialize()
        return
    if not all(given):
        raise MeshError(
            "a run of several processes needs --coordinator_address, --num_processes and --process_id together, "
            "or --coordinator_address=auto on a cluster that JAX detects."
        )
    if not 0 <= process_id < num_processes:
        raise MeshError(
            f"--process_id={process_id} must lie in 0..{num_processes - 1} for --num_processes={num_processes}."
        )
    _initialize(coordinator_address, num_processes, process_id)


def _initialize(*address: Any) -> None:
    try:
        jax.distributed.initialize(*address)
    except (ValueError, RuntimeError) as error:
        where = "detect a cluster" if not address else f"join the run at {address[0]!r} (HOST:PORT)"
        raise MeshError(f"JAX could not {where}: {error}") from error


def broadcast_from_main(make: Callable[[], Any]) -> Any:
    """The JSON value that `make` gives in process 0, in every process; its error is raised in every process too."""
    if jax.process_count() == 1:
        return make()
    payload, failure = b"", None
    if jax.process_index() == 0:
        try:
            payload = json.dumps({"value": make()}).encode()
        except Exception as error:  # whatever it is, the others must not wait for a value
            failure = error
            payload = json.dumps({"error": str(error)}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(payload))))
    buffer = np.frombuffer(payload.ljust(size), np.uint8)
    answer = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))))
    if failure is not None:
        raise failure
    if "error" in answer:
        raise RequestError(answer["error"])
    return answer["value"]
