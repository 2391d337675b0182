"""The benchmarks on a tiny model: they run, write what they say, and time the computation that they claim to time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODEL = {"n_layers": 1, "dim": 32, "n_heads": 2, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 32, "vocab_size": 64}
TINY = ("--config=configs/demo.py", *(f"--config.model.{name}={size}" for name, size in MODEL.items()))
TINY += ("--config.model.dtype=float32",)


def run(folder, *command):
    """(exit status, standard output, standard error) of Python, with an empty cache of executables."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def results(folder, name):
    written = json.loads((folder / f"{name}.json").read_text())
    assert set(written) == {"device", "versions", "command", "commit", "workload", "results"}
    return written["results"]


STEPS_ARE_THE_MODEL = """
import sys

sys.argv = ARGS = {args!r}  # where overrides of the config are looked for

import jax, numpy as np
from absl import flags
from benchmarks import steps
from sharded_llama.config import LlamaConfig
from sharded_llama.engine.steps import Column, StepShape
from sharded_llama.mesh import make_mesh, simulate_cpu_devices
from sharded_llama.model import xfmr
from sharded_llama.weights import init_weights

flags.FLAGS(ARGS)
simulate_cpu_devices(2)
mesh, length = make_mesh(2, 1), 20
config = LlamaConfig.from_dict(steps.CONFIG.value.model)
weights = init_weights(jax.random.key(3), config, mesh=mesh)
shape = StepShape(1, 3, 16)
runner = steps.make_runner(config, mesh, weights, shape, slots=2, length=length + 1)
works = steps.prefill_works(shape, 2, 2, length, config.vocab_size)
prompts = np.zeros((2, 2, length), np.int32)
for work in works:
    rows = work.rows_RX.reshape(2, -1, Column.COUNT)[:, shape.n_single :]
    tokens = work.tokens_CQ.reshape(2, -1, 16)
    for shard, row in np.argwhere(rows[..., Column.LENGTH] > 0):
        start, n, slot = rows[shard, row, [Column.START, Column.LENGTH, Column.SLOT]]
        prompts[shard, slot, start : start + n] = tokens[shard, row, :n]
    runner.execute(work)
prompts = prompts.reshape(4, length)

logits = jax.jit(lambda tokens: xfmr(weights, config, tokens, mesh=mesh)[..., : config.vocab_size])

def following(tokens):
    padded = np.pad(tokens, [(0, 0), (0, length + 1 - tokens.shape[1])])
    return np.asarray(logits(runner.put(padded)))[:, tokens.shape[1] - 1].argmax(-1)

first = following(prompts)
assert len(works) == 2 and len(set(first.tolist())) > 1
np.testing.assert_array_equal(runner.state.tokens_S, first)
runner.execute(steps.decode_work(StepShape(2, 0, 1), 2, length))
prompts = np.concatenate([prompts, first[:, None]], axis=1)
np.testing.assert_array_equal(runner.state.tokens_S, following(prompts))
steps.main([])
"""


def test_steps(tmp_path):
    """Prefill and decode works, run as they are timed, give the tokens of the model without a cache; then the times."""
    flags = ["--simulate_devices=2", "--mesh=data:2", "--batches=4", "--prefill=4x20", "--cached=17"]
    args = ["steps", *TINY, *flags, "--steps=2", "--recompute=3", "--name=steps", f"--out={tmp_path}"]
    status, _, stderr = run(tmp_path, "-c", STEPS_ARE_THE_MODEL.format(args=args))
    assert status == 0, stderr
    decode, prefill, recompute = results(tmp_path, "steps")
    assert (decode["step"], decode["batch"], decode["cached"]) == ("decode", 4, 17)
    assert (prefill["step"], prefill["batch"], prefill["tokens"]) == ("prefill", 4, 20)
    assert min(decode["ms"], prefill["ms"]) > 0
    assert recompute["ratio"] == recompute["recomputed_s"] / recompute["cached_s"]


def test_engine(tmp_path):
    flags = ["--simulate_devices=1", "--max_num_seqs=1", "--max_num_batched_tokens=17", "--deterministic"]
    flags += ["--batches=1", "--prompt=40", "--steps=3", "--pool_batch=1", "--pool_tokens=40,160", "--trials=2"]
    flags += ["--workload=2x20x6", f"--out={tmp_path}"]
    status, stdout, stderr = run(tmp_path, "-m", "benchmarks.engine", *TINY, *flags)
    assert status == 0, stderr
    rows = results(tmp_path, "engine")
    assert all(json.dumps(row) in stdout for row in rows)
    by_part = {}
    for row in rows:
        by_part.setdefault(row["what"], []).append(row)

    compilations = by_part.pop("compilations after start")
    assert [row["count"] for row in compilations] == [0] * 5, "overhead, two pools, two modes"

    (overhead,) = by_part.pop("overhead")
    assert overhead["engine_over_bare"] == overhead["engine_ms"] / overhead["bare_ms"]
    assert 0 < overhead["plan_ms"] + overhead["dispatch_ms"] + overhead["wait_ms"] <= overhead["engine_ms"]
    # The work was taken from the middle: behind a prompt of 32 to 47 tokens, 3 timed steps and what is around them.
    assert 32 + 3 + 4 < overhead["context"] < 48 + 3 + 4 * 4

    few, many, ratio = by_part.pop("pool")
    assert (few["cached_tokens"], many["cached_tokens"]) == (64, 160)  # prompts of two full pages
    assert few["pages"] < many["pages"]
    assert ratio["last_over_first"] == many["engine_ms"] / few["engine_ms"]

    default, alike, cost = by_part.pop("deterministic")
    assert (default["deterministic"], alike["deterministic"]) == (False, True)
    assert (alike["trials"], alike["differing"], alike["differing_tokens"]) == (2, 0, 0)
    assert cost["cost_percent"] == 100 * (1 - alike["output_tokens_per_s"] / default["output_tokens_per_s"])

    for row in (default, alike):
        assert row["requests"] == "2x20x6"
        assert row["output_tokens_per_s"] == pytest.approx(2 * 6 / row["seconds"])
        assert row["input_tokens_per_s"] == pytest.approx(2 * 20 / row["seconds"])
        # One slot: no two requests in one step. By default a dispatch has up to four steps.
        assert row["steps"] >= 2 * (6 if row["deterministic"] else 2)
    assert not by_part


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--parts=overhead,speed", "--parts=speed: choose among overhead, pool"),
        ("--workload=256x1000", "--workload: '256x1000' is not NxINxOUT"),
        ("--batches=0", "--batches=0: expected whole numbers above 0"),
    ],
)
def test_a_wrong_flag_is_one_message(flag, message, tmp_path):
    status, stdout, stderr = run(tmp_path, "-m", "benchmarks.engine", *TINY, flag)
    assert (status, stdout) == (1, "")
    assert message in stderr
    assert "Traceback" not in stderr
