"""Loading and exporting hold no second copy of the model on the host."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sharded_llama.checkpoint.hf.safetensors import SafetensorsWriter
from sharded_llama.checkpoint.layout import canonical_shapes
from sharded_llama.checkpoint.names import HF_NAMES, to_stored
from sharded_llama.checkpoint.source import TensorInfo
from sharded_llama.config import LlamaConfig

CONFIG = LlamaConfig(
    dim=1024,
    n_layers=12,
    n_heads=16,
    n_kv_heads=4,
    head_dim=64,
    ffn_dim=3072,
    vocab_size=2048,
    norm_eps=1e-5,
    rope_theta=1e4,
)

# Prints how many bytes the peak of resident memory grew. Bytes of mappings count while they are mapped.
SCRIPT = """
import sys
import jax
from sharded_llama.config import LlamaConfig
from sharded_llama.mesh import make_mesh, simulate_cpu_devices
simulate_cpu_devices(8)
from sharded_llama.checkpoint import load_weights, open_checkpoint, save_weights

def status(field):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(field + ":")]
    return 1024 * int(line.split()[1])

stored, wanted = sys.argv[1], sys.argv[2]
config = eval(sys.argv[3])
mesh = make_mesh(2, 4)
jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
before = status("VmRSS")
weights = load_weights(open_checkpoint(stored), config, mesh=mesh, threads=2, max_bytes_in_flight=32 << 20)
if wanted == "export":
    save_weights(weights, config, sys.argv[4])
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("stored")
    shapes = canonical_shapes(CONFIG).items()
    infos = {to_stored(name, HF_NAMES): TensorInfo(shape, CONFIG.jnp_dtype) for name, shape in shapes}
    writer = SafetensorsWriter(folder / "model.safetensors", infos)
    for name, info in infos.items():
        writer.write(name, np.zeros(info.shape, info.dtype))
    writer.close()
    return folder, sum(info.nbytes for info in infos.values())


def peak_growth(folder: Path, wanted: str, config: LlamaConfig, target: Path) -> int:
    command = [sys.executable, "-c", SCRIPT, str(folder), wanted, repr(config), str(target)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_holds_the_model_once(stored: tuple[Path, int], tmp_path: Path, dtype: str):
    """Two replicas over `data` on simulated devices share the model's bytes; converting adds only blocks."""
    folder, nbytes = stored
    nbytes *= CONFIG.replace(dtype=dtype).jnp_dtype.itemsize // 2
    assert nbytes > 250e6
    growth = peak_growth(folder, "load", CONFIG.replace(dtype=dtype), tmp_path)
    assert 0.9 * nbytes < growth < nbytes + 60e6


def test_exporting_adds_a_few_arrays(stored: tuple[Path, int], tmp_path: Path):
    folder, nbytes = stored
    growth = peak_growth(folder, "export", CONFIG, tmp_path / "model")
    assert growth < nbytes + 80e6
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > nbytes
