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


@pytest.mark.parametrize(("data", "config"), [(1, EVEN), (4, EVEN), (1, META)], ids=["model", "data", "meta"])
def test_two_processes(tmp_path: Path, data: int, config: LlamaConfig):
    state = save_random_model(tmp_path / "hf", config)
    folder = tmp_path / "hf"
    if config is META:
        folder = tmp_path / "meta"
        save_meta(folder, state, config, files=4)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    arguments = [str(folder), str(tmp_path / "exported"), str(data), repr(config)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, address, str(rank), *arguments],
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
    assert "exported already exists" in outputs[0][0]
    assert "the first process could not export" in outputs[1][0]

    stored = load_file(tmp_path / "hf" / "model.safetensors")
    files = sorted((tmp_path / "exported").glob("*.safetensors"))
    exported = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 1
    assert exported.keys() == stored.keys()
    for name, tensor in stored.items():
        assert_bits_equal(to_numpy(exported[name]), to_numpy(tensor))
    size = sum(tensor.nbytes for tensor in stored.values())
    norms = sum(tensor.nbytes for tensor in stored.values() if tensor.ndim == 1)
    counts = [int(output.split("bytes ")[-1].split()[0]) for output, _ in outputs]
    # `model` over both processes: half of the matrices each. `data` over both: every process holds the whole model.
    assert counts == 2 * [(size + norms) // 2 if data == 1 else size]
