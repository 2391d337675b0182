"""An answer does not depend on the company in which it is made: who else runs, where, and in how many pieces.

`--exhaustive`: 100 trials on each engine instead of 16.
"""

import collections
import dataclasses

import numpy as np
import pytest
from hf_reference import distance, make_model, save

from sharded_llama.attention import paged
from sharded_llama.engine.engine import Engine
from sharded_llama.engine.loading import load_model
from sharded_llama.engine.options import EngineOptions
from sharded_llama.mesh import make_mesh
from sharded_llama.sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("optimising_compiler")

VOCAB = 131
OPTIONS = {"num_pages": 12, "decode_steps": 1}
SIZES = {"max_num_seqs": 8, "max_num_batched_tokens": 40}  # of each data shard
RNG = np.random.default_rng(0)
LASTING = {"ignore_eos": True, "max_tokens": 20}
# What is watched, alone and in company: longer than a page, so that some of it can be cached.
WATCHED = {
    "greedy": (RNG.integers(3, VOCAB, 30).tolist(), SamplingParams(temperature=0.0, logprobs=0, **LASTING)),
    "sampled": (RNG.integers(3, VOCAB, 21).tolist(), SamplingParams(seed=5, logprobs=3, **LASTING)),
    "filtered": (
        RNG.integers(3, VOCAB, 18).tolist(),
        SamplingParams(seed=6, top_k=9, top_p=0.9, logprobs=1, **LASTING),
    ),
}


@dataclasses.dataclass
class Circumstances:
    """How the watched requests were served, over all trials."""

    slots: set = dataclasses.field(default_factory=set)
    cached: set = dataclasses.field(default_factory=set)
    pieces: set = dataclasses.field(default_factory=set)
    preempted: set = dataclasses.field(default_factory=set)


@pytest.fixture(scope="module")
def new_engine(tmp_path_factory):
    def checkpoint(n_layers):
        model = make_model("grouped", num_hidden_layers=n_layers, max_position_embeddings=96, eos_token_id=None)
        return save(model, tmp_path_factory.mktemp("model"))

    folders = {n_layers: checkpoint(n_layers) for n_layers in (1, 2)}

    def make(mesh_shape, dtype, n_layers=1, **options):
        loaded = load_model(
            folders[n_layers], mesh=make_mesh(*mesh_shape), dtype=dtype, skip_tokenizer=True, progress=False
        )
        sizes = {name: mesh_shape[0] * size for name, size in SIZES.items()}
        config = loaded.config.replace(eos_ids=(100, 101))
        return Engine(config, loaded.mesh, loaded.weights, EngineOptions(**OPTIONS, **sizes, **options))

    return make


def run(engine, requests, seen):
    """Tokens and log-probabilities of requests (name, prompt, params, priority) by name; `seen` notes the watched."""
    watched = {}
    for name, prompt, params, priority in requests:
        engine.add_request(name, prompt, params, priority=priority)
        if name in WATCHED:
            (watched[name],) = engine._sequences[name]
    pieces, runs = collections.Counter(), collections.Counter()
    schedule, place = engine._scheduler.schedule, engine._scheduler._place

    def noted_schedule():
        plan = schedule()
        for chunk in (chunk for of_shard in plan.chunks for chunk in of_shard) if plan else ():
            pieces[chunk.seq.request_id] += runs[chunk.seq.request_id] == 1
        return plan

    def noted_place(seq, shard, *args):
        place(seq, shard, *args)
        runs[seq.request_id] += 1
        if seq.request_id in watched:
            seen.slots.add((seq.shard, seq.slot))

    engine._scheduler.schedule, engine._scheduler._place = noted_schedule, noted_place
    found = {name: [] for name, *_ in requests}
    while engine.has_unfinished:
        for delta in engine.step():
            found[delta.request_id] += zip(delta.token_ids, delta.logprobs or delta.token_ids, strict=True)
    engine._scheduler.schedule, engine._scheduler._place = schedule, place
    for name, sequence in watched.items():
        seen.cached.add(sequence.n_cached)
        seen.pieces.add(pieces[name])
        seen.preempted.add(runs[name] > 1)
    return {name: found[name] for name in watched}


def company(rng):
    """One to fifteen other requests; some begin like a watched one."""
    others = []
    for i in range(rng.integers(1, 16)):
        prompt = rng.integers(3, VOCAB, rng.integers(1, 31)).tolist()
        if rng.random() < 0.2:
            prompt = WATCHED["greedy"][0][: rng.integers(1, 30)] + prompt[:5]
        params = SamplingParams(
            temperature=float(rng.integers(0, 3)) / 2,
            seed=int(rng.integers(0, 99)),
            max_tokens=int(rng.integers(1, 13)),
            logprobs=int(rng.integers(1, 4)) if rng.random() < 0.2 else None,
        )
        others.append((f"other{i}", prompt, params, int(rng.integers(0, 3))))
    return others


def trials(engine, n_trials):
    """The answers of all watched requests in trials, after those alone; and the circumstances."""
    seen = Circumstances()
    yield {name: run(engine, [(name, *WATCHED[name], 0)], Circumstances())[name] for name in WATCHED}
    for seed in range(n_trials):
        rng = np.random.default_rng(seed)
        requests = [*company(rng), *((name, *WATCHED[name], int(rng.integers(0, 3))) for name in WATCHED)]
        yield run(engine, [requests[i] for i in rng.permutation(len(requests))], seen)
    assert len(seen.slots) >= engine.mesh.shape["data"] * 5
    assert seen.cached == {0, 16}
    assert {1, 2} <= seen.pieces
    assert seen.preempted == {False, True}


@pytest.fixture
def n_trials(request):
    return 100 if request.config.getoption("exhaustive") else 16


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_is_bitwise(new_engine, mesh_shape, dtype, n_trials):
    engine = new_engine(mesh_shape, dtype, deterministic=True)
    alone, *together = trials(engine, n_trials)
    assert all(answers == alone for answers in together)
    assert [len(answer) for answer in alone.values()] == [20] * 3


def test_deterministic_in_runs_is_bitwise(new_engine, monkeypatch, n_trials):
    """Where attention takes consecutive tokens of a prompt together, as on GPUs, a token's place among them is as good
    as any other."""
    monkeypatch.setattr("sharded_llama.engine.engine.run_length", lambda *_: 4)
    # Each row for itself, as in the kernels for GPUs.
    monkeypatch.setattr("sharded_llama.attention.paged._in_runs", paged._together)
    engine = new_engine((1, 1), "bfloat16", deterministic=True)
    assert engine.sizes.run_length == 4
    alone, *together = trials(engine, n_trials)
    assert all(answers == alone for answers in together)


@pytest.mark.parametrize("mesh_shape", [(2, 2)], ids=str)
def test_otherwise_up_to_rounding(new_engine, mesh_shape, n_trials):
    """The same tokens in float32; log-probabilities as near as rounding leaves them."""
    alone, *together = trials(new_engine(mesh_shape, "float32", n_layers=2), n_trials)
    for answers in together:
        for name, answer in answers.items():
            assert [token for token, _ in answer] == [token for token, _ in alone[name]]
            ours, theirs = ([p.logprob for _, p in of] for of in (answer, alone[name]))
            assert distance(ours, theirs) < 1e-5
            assert [p.rank for _, p in answer] == [p.rank for _, p in alone[name]]
