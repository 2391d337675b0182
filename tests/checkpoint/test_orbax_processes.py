"""Two processes with four devices each: each writes and reads its share, and a failure in one is known to both."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from hf_models import CONFIG, assert_bits_equal, expected_weights
from safetensors.numpy import save_file

from sharded_llama.checkpoint import load_weights, open_checkpoint
from sharded_llama.checkpoint.hf.writer import to_hf_dict
from sharded_llama.checkpoint.layout import canonical_shapes
from sharded_llama.checkpoint.names import HF_NAMES, to_stored
from sharded_llama.checkpoint.orbax.live import save_orbax
from sharded_llama.json_file import write_json
from sharded_llama.mesh import make_mesh

EVEN = CONFIG.replace(vocab_size=128, ffn_dim=96, head_dim=16, dtype="float32")

SCRIPT = """
import sys
import jax
import numpy as np
import orbax.checkpoint as ocp
from sharded_llama.config import LlamaConfig, RopeScaling
from sharded_llama.errors import CheckpointError
from sharded_llama.mesh import make_mesh, simulate_cpu_devices, start_distributed
from sharded_llama.checkpoint import load_weights, open_checkpoint
from sharded_llama.checkpoint.orbax.source import OrbaxSource
from sharded_llama.checkpoint.orbax.live import save_orbax

address, rank, stored, one, two, config = *sys.argv[1:6], eval(sys.argv[6])
simulate_cpu_devices(4)
start_distributed(address, 2, int(rank))
read, counts = OrbaxSource.read, []
OrbaxSource.read = lambda *args: counts.append(read(*args)) or counts[-1]
for data in (1, 2):
    mesh = make_mesh(data, 8 // data)
    weights = load_weights(open_checkpoint(stored), config, mesh=mesh)
    save_orbax(weights, config, f"{two}-{data}", mesh=mesh).wait()
    for folder in (one, f"{two}-{data}"):
        counts.clear()
        loaded = load_weights(open_checkpoint(folder), config, mesh=mesh)
        print("bytes", sum(counts))
        for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(loaded), strict=True):
            for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
                assert x.index == y.index and np.array_equal(x.data, y.data)

try:
    save_orbax(weights, config, f"{two}-1", mesh=mesh)
except CheckpointError as e:
    print("refused:", e)

async def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")

if rank == "1":
    ocp.PyTreeCheckpointHandler.async_save = fail
saving = save_orbax(weights, config, two + "-failed", mesh=mesh)
try:
    saving.wait()
except CheckpointError as e:
    print("failed:", e)
"""


def test_two_processes(tmp_path: Path):
    rng = np.random.default_rng(0)
    shapes = canonical_shapes(EVEN).items()
    state = {to_stored(name, HF_NAMES): rng.standard_normal(shape).astype(np.float32) for name, shape in shapes}
    (tmp_path / "stored").mkdir()
    save_file(state, tmp_path / "stored" / "model.safetensors")
    write_json(tmp_path / "stored" / "config.json", to_hf_dict(EVEN))
    mesh = make_mesh(2, 4)
    weights = load_weights(open_checkpoint(tmp_path / "stored"), EVEN, mesh=mesh)
    save_orbax(weights, EVEN, tmp_path / "one", mesh=mesh).wait()

    outputs = run(*(str(tmp_path / name) for name in ("stored", "one", "two")), repr(EVEN))

    assert "two-1 already exists" in outputs[0]
    assert "process 0 could not save" in outputs[1]
    assert "process 1 could not save" in outputs[0]
    assert "two-failed: cannot be written: [Errno 28] No space left on device" in outputs[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "stored", "two-1", "two-2"]

    size = sum(tensor.nbytes for tensor in state.values())
    for data in (1, 2):  # each wrote about half: of what `data` repeats, the replicas share the writing too
        folder = tmp_path / f"two-{data}"
        written = [sum(f.stat().st_size for f in folder.glob(f"weights/ocdbt.process_{i}/d/*")) for i in range(2)]
        # Beside the tensors there are nodes of the tree, which are written anew as often as commits happen to meet.
        assert all(0.4 * sum(written) < count < 0.6 * sum(written) for count in written), written
        assert 0.9 * size < sum(written) < 1.2 * size, (written, size)
        loaded = load_weights(open_checkpoint(folder), EVEN, mesh=make_mesh(1, 1))
        jax.tree.map(assert_bits_equal, loaded, expected_weights(state, EVEN, 1))

    # With one replica, each read half of the model, and both the norms; with two, each read one.
    half = (size + sum(tensor.nbytes for tensor in state.values() if tensor.ndim == 1)) // 2
    for output in outputs:
        counts = [int(line.split()[1]) for line in output.splitlines() if line.startswith("bytes")]
        assert counts == [half, half, size, size]


def run(*arguments: str) -> list[str]:
    """What the two processes print."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
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
        outputs = [process.communicate(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()  # a hung collective ignores SIGTERM
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [output for output, _ in outputs]
