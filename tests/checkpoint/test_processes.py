"""Two processes with four devices each: every process reads its own half, and the export is whole."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import meta_models
import pytest
from hf_models import CONFIG, assert_bits_equal, save_random_model, to_numpy
from meta_models import save_meta
from safetensors.torch import load_file

from sharded_llama.config import LlamaConfig

META = meta_models.CONFIG.replace(dtype="bfloat16")
EVEN = CONFIG.replace(vocab_size=128, ffn_dim=96, dtype="bfloat16")

SCRIPT = """
import sys
from sharded_llama.config import LlamaConfig, RopeScaling
from sharded_llama.errors import CheckpointError
from sharded_llama.mesh import make_mesh, simulate_cpu_devices, start_distributed
from sharded_llama.checkpoint import ExportFormat, open_checkpoint, save_weights
from sharded_llama.checkpoint.reader import read_weights

address, rank, stored, target, data, config = *sys.argv[1:6], eval(sys.argv[6])
simulate_cpu_devices(4)
start_distributed(address, 2, int(rank))
mesh = make_mesh(int(data), 8 // int(data))
weights, stats = read_weights(open_checkpoint(stored), config, mesh=mesh)
save_weights(weights, config, target, ExportFormat("hf", 60_000))
try:
    save_weights(weights, config, target)
except CheckpointError as e:
    print("bytes", stats.nbytes, "refused", e)
"""


def run_two(script: str, arguments: list[str]) -> list[str]:
    """What two processes print that run `script` with an address, their number and `arguments`."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, address, str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NPROC": "16"},
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()  # a hung collective ignores SIGTERM
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [output for output, _ in outputs]


@pytest.mark.parametrize(("data", "config"), [(1, EVEN), (4, EVEN), (1, META)], ids=["model", "data", "meta"])
def test_two_processes(tmp_path: Path, data: int, config: LlamaConfig):
    state = save_random_model(tmp_path / "hf", config)
    folder = tmp_path / "hf"
    if config is META:
        folder = tmp_path / "meta"
        save_meta(folder, state, config, files=4)
    arguments = [str(folder), str(tmp_path / "exported"), str(data), repr(config)]
    outputs = run_two(SCRIPT, arguments)
    assert "exported already exists" in outputs[0]
    assert "the first process could not export" in outputs[1]

    stored = load_file(tmp_path / "hf" / "model.safetensors")
    files = sorted((tmp_path / "exported").glob("*.safetensors"))
    exported = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 1
    assert exported.keys() == stored.keys()
    for name, tensor in stored.items():
        assert_bits_equal(to_numpy(exported[name]), to_numpy(tensor))
    size = sum(tensor.nbytes for tensor in stored.values())
    norms = sum(tensor.nbytes for tensor in stored.values() if tensor.ndim == 1)
    counts = [int(output.split("bytes ")[-1].split()[0]) for output in outputs]
    # `model` over both processes: half of the matrices each. `data` over both: every process holds the whole model.
    assert counts == 2 * [(size + norms) // 2 if data == 1 else size]


FAILING = """
import sys
import jax
from sharded_llama.config import LlamaConfig, RopeScaling
from sharded_llama.errors import CheckpointError, ConfigError
from sharded_llama.mesh import make_mesh, simulate_cpu_devices, start_distributed
from sharded_llama.checkpoint import ExportFormat, save_weights
from sharded_llama.weights import init_weights

address, rank, target, config = *sys.argv[1:4], eval(sys.argv[4])
simulate_cpu_devices(4)
start_distributed(address, 2, int(rank))
weights = init_weights(jax.random.key(0), config, mesh=make_mesh(1, 8))
try:
    save_weights(weights, config, target, ExportFormat("meta"))
except (CheckpointError, ConfigError) as e:
    print(type(e).__name__, e)
"""


def test_a_failure_while_writing_is_known_to_both(tmp_path: Path):
    """Of whatever type: the second process would wait for gathers that never come."""
    outputs = run_two(FAILING, [str(tmp_path / "new"), repr(EVEN)])
    assert "ConfigError Meta's layout has no head_dim" in outputs[0]
    assert "CheckpointError the first process could not export" in outputs[1]
    assert not list(tmp_path.iterdir())
