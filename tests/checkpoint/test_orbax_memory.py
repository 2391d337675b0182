"""Memory of writing and reading orbax items, which tensorstore takes where Python does not see it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Prints how many bytes the peak of resident memory grew.
SCRIPT = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import ml_dtypes
import numpy as np
from sharded_llama.checkpoint.orbax.source import open_orbax
from sharded_llama.checkpoint.orbax.writer import OrbaxWriter
from sharded_llama.checkpoint.source import TensorInfo
from sharded_llama.errors import CheckpointError

def status(field):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(field + ":")]
    return 1024 * int(line.split()[1])

item, what, bf16 = Path(sys.argv[1]), sys.argv[2], np.dtype(ml_dtypes.bfloat16)
infos = {"tok_embeddings": TensorInfo((24576, 4096), bf16), "layers.0.w2": TensorInfo((4096, 24576), bf16)}

def slices(shape):
    step = (16 << 20) // (2 * shape[1])
    return [(slice(row, min(row + step, shape[0])), slice(0, shape[1])) for row in range(0, shape[0], step)]

def read(name, box):
    out = np.empty([s.stop - s.start for s in box], bf16)
    source.read(name, box, out)
    return out[0, 0] == 0

with OrbaxWriter(item.with_name("warm-" + what), {"norm": TensorInfo((4,), bf16)}) as writer:
    writer.write("norm", np.zeros(4, bf16))
block = np.random.default_rng(0).integers(0, 1 << 15, 8 << 20, np.uint16).view(bf16)
before = status("VmRSS")
if what == "write":
    with OrbaxWriter(item, infos) as writer:
        for name, info in infos.items():
            for rows, _ in slices(info.shape):
                shape = (rows.stop - rows.start, info.shape[1])
                writer.write(name, block[: shape[0] * shape[1]].reshape(shape))
else:
    source = open_orbax(item)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(read, name, box) for name, info in source.tensors.items() for box in slices(info.shape)]
        assert any([job.result() for job in jobs]) == (what == "zeros")
print(status("VmHWM") - before)
"""


def peak_growth(item: Path, what: str) -> int:
    command = [sys.executable, "-c", SCRIPT, str(item), what]
    # What is freed goes back to the system, so that the peak is of what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=environment)
    return int(done.stdout)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """An item of two tensors of 201 MB each, and the memory that it took to write it."""
    item = tmp_path_factory.mktemp("memory") / "item"
    return item, peak_growth(item, "write")


def test_writing_holds_a_few_chunks(written: tuple[Path, int]):
    item, growth = written
    assert sum(file.stat().st_size for file in item.rglob("*") if file.is_file()) > 300e6
    assert growth < 150e6


def test_reading_holds_a_few_chunks(written: tuple[Path, int]):
    """Four threads: a block, a chunk and its compressed bytes each, and the cache of 64 MiB."""
    growth = peak_growth(written[0], "read")
    assert growth < 220e6


def test_a_chunk_of_nothing_takes_a_bounded_memory(tmp_path: Path):
    """2 GB of zeros in a few bytes: as far as a description may go, with a frame that unpacks to just that."""
    item = tmp_path / "item"
    (item / "tok_embeddings").mkdir(parents=True)
    (item / "_METADATA").write_text(
        '{"tree_metadata": {"x": {"key_metadata": [{"key": "tok_embeddings", "key_type": 2}], "value_metadata": '
        '{"value_type": "np.ndarray"}}}, "use_ocdbt": false, "store_array_data_equal_to_fill_value": true}'
    )
    (item / "tok_embeddings" / ".zarray").write_text(
        '{"zarr_format": 2, "shape": [262144, 4096], "chunks": [32768, 4096], "dtype": "bfloat16", "order": "C", '
        '"compressor": {"id": "zstd", "level": 1}, "filters": null, "fill_value": null}'
    )
    blocks = [(128 << 10 << 3 | 1 << 1 | (i == 2047)).to_bytes(3, "little") + b"\0" for i in range(2048)]
    for i in range(8):
        (item / "tok_embeddings" / f"{i}.0").write_bytes(b"\x28\xb5\x2f\xfd\x00\x58" + b"".join(blocks))
    growth = peak_growth(item, "zeros")
    assert growth < 1.1e9
