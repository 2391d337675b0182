"""Times loading a checkpoint into a mesh against plain reads of the same files, and measures the host's memory.

    python -m benchmarks.load --config=configs/llama3_1_70b.py --config.model.n_layers=3 --format=hf \
        --folder=/tmp/synthetic --simulate_devices=8 --meshes='data:1,model:1;data:1,model:8'

Writes a synthetic checkpoint of the config's shapes to --folder unless it is there. The plain reads take as many
threads into fresh memory that they keep. What is timed is in the page cache. `host_bytes_above_arrays` is the peak of
resident memory during the load, less what was resident before and, on CPU, less the arrays.
"""

import gc
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import config_flags

from sharded_llama.benchmark import record
from sharded_llama.checkpoint import FORMATS, CheckpointSource, ExportFormat, TensorInfo, convert, open_checkpoint
from sharded_llama.checkpoint.layout import canonical_shapes
from sharded_llama.checkpoint.reader import THREADS, read_weights
from sharded_llama.config import LlamaConfig
from sharded_llama.mesh import make_mesh, parse_mesh, simulate_cpu_devices

CONFIG = config_flags.DEFINE_config_file("config", None, "Model, such as configs/llama3_1_8b.py.")
FOLDER = flags.DEFINE_string("folder", None, "The synthetic checkpoint; written when it is not there.")
FORMAT = flags.DEFINE_enum("format", "hf", FORMATS, "Its format.")
META_FILES = flags.DEFINE_integer("meta_files", 1, "Files of a Meta checkpoint.")
MESHES = flags.DEFINE_string("meshes", "data:1,model:1", "Meshes to load into, separated by semicolons.")
SIMULATE = flags.DEFINE_integer("simulate_devices", 0, "Simulated CPU devices.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds; each times the plain reads and the loads in turn.")
NAME = flags.DEFINE_string("name", "load", "Name of the result.")
OUT = flags.DEFINE_string("out", "benchmarks/results", "Folder of the result.")
flags.mark_flags_as_required(["config", "folder"])

BLOCK_BYTES = 16 << 20


class SyntheticSource:
    """A checkpoint that is not there: tensors of normally distributed values, made when they are read."""

    format: ClassVar[str] = "synthetic"
    location = "/nonexistent"

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self.tensors = {name: TensorInfo(shape, config.jnp_dtype) for name, shape in canonical_shapes(config).items()}
        self._values = np.random.default_rng(0).standard_normal(1 << 24, np.float32).astype(config.jnp_dtype)

    def read_config(self) -> LlamaConfig:
        return self.config

    def stored_name(self, name: str) -> str:
        return name

    def read(self, name: str, slices: tuple[slice, ...], out: np.ndarray) -> int:
        start = zlib.crc32(f"{name} {slices[0].start}".encode()) % (1 << 23)
        for row in out.reshape(-1, out.shape[-1]) if out.ndim > 1 else [out]:
            row[...] = self._values[start : start + row.size]
            start = (start + row.size) % (1 << 23)
        return out.nbytes


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def bytes_read() -> int:
    """Bytes that this process has asked the system to read; mapped files do not count."""
    (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar:"))
    return int(line.split()[1])


def read_plainly(files: list[Path], threads: int) -> float:
    """Bytes per second at which threads read whole files, block by block, into fresh memory that is kept."""
    kept = [np.empty(file.stat().st_size, np.uint8) for file in files]
    descriptors = [os.open(file, os.O_RDONLY) for file in files]

    def read(file: int, start: int) -> None:
        out = kept[file][start : start + BLOCK_BYTES]
        done = 0
        while done < out.size:
            done += os.preadv(descriptors[file], [out[done:]], start + done)

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        blocks = [(i, start) for i, memory in enumerate(kept) for start in range(0, memory.size, BLOCK_BYTES)]
        list(pool.map(lambda block: read(*block), blocks))
    seconds = time.perf_counter() - begin
    for descriptor in descriptors:
        os.close(descriptor)
    return sum(x.nbytes for x in kept) / seconds


def read_columns(source: CheckpointSource, threads: int) -> float:
    """Bytes per second of reading half of the columns of every wo and w2, as one of two processes does."""
    tensors = {name: info for name, info in source.tensors.items() if name.endswith((".wo", ".w2"))}

    def read(block: tuple[str, int]) -> np.ndarray:
        name, row = block
        rows, columns = tensors[name].shape
        rows = min(rows - row, 512)
        out = np.empty((rows, columns // 2), tensors[name].dtype)
        source.read(name, (slice(row, row + rows), slice(0, columns // 2)), out)
        return out

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        blocks = [(name, row) for name, info in tensors.items() for row in range(0, info.shape[0], 512)]
        kept = list(pool.map(read, blocks))
    return sum(x.nbytes for x in kept) / (time.perf_counter() - begin)


def time_load(source: CheckpointSource, config: LlamaConfig, mesh: Mesh) -> dict[str, Any]:
    gc.collect()
    time.sleep(1)  # memory of the round before goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resident, read = memory("VmRSS"), bytes_read()
    weights, stats = read_weights(source, config, mesh=mesh, progress=False)
    jax.block_until_ready(weights)
    arrays = 0
    if mesh.devices.flat[0].platform == "cpu":  # shards that `data` repeats share their memory
        for x in jax.tree.leaves(weights):
            arrays += sum({str(shard.index): shard.data.nbytes for shard in x.addressable_shards}.values())
    return {
        "gb_per_s": stats.gb_per_s,
        "tensor_bytes_read": stats.nbytes,
        "file_bytes_read": bytes_read() - read,
        "host_bytes_above_arrays": memory("VmHWM") - resident - arrays,
    }


def main(_: list[str]) -> None:
    if SIMULATE.value:
        simulate_cpu_devices(SIMULATE.value)
    config = LlamaConfig.from_dict(CONFIG.value.model)
    folder = Path(FOLDER.value)
    if not folder.exists():
        convert(SyntheticSource(config), config, folder, ExportFormat(FORMAT.value, meta_files=META_FILES.value))
    source = open_checkpoint(folder)
    meshes = {text: make_mesh(**parse_mesh(text)) for text in MESHES.value.split(";")}
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    sizes = [info.nbytes for info in source.tensors.values()]
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
    results = []
    for turn in range(ROUNDS.value):
        plain = read_plainly(files, THREADS)
        row: dict[str, Any] = {"round": turn, "what": "plain reads", "gb_per_s": plain / 1e9}
        results.append(row)
        print(row, flush=True)
        rows = [{"what": f"load {text}", **time_load(source, config, mesh)} for text, mesh in meshes.items()]
        rows.append({"what": "half of the columns of wo and w2", "gb_per_s": read_columns(source, THREADS) / 1e9})
        for row in rows:
            row = {"round": turn, **row, "ratio_to_plain": row["gb_per_s"] * 1e9 / plain}
            print(row, flush=True)
            results.append(row)
    workload = {
        "config": CONFIG.value.model.to_dict(),
        "format": source.format,
        "file_bytes": sum(file.stat().st_size for file in files),
        "tensor_bytes": sum(sizes),
        "largest_tensor_bytes": max(sizes),
        "threads": THREADS,
    }
    print(record.save(NAME.value, record.device_of(next(iter(meshes.values()))), workload, results, OUT.value))


if __name__ == "__main__":
    app.run(main)
