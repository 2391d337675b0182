"""What changes logits before anything is chosen, against the specification."""

import functools

import jax
import numpy as np
import pytest
from sampling import sampler_spec as spec

from sharded_llama.mesh import make_mesh
from sharded_llama.sampling import SamplingParams, pack_rows
from sharded_llama.sampling.penalties import process_logits
from sharded_llama.sampling.slots import SLOT_SPECS
from sharded_llama.sharding import SPECS, padded

MESHES = [(1, 1), (2, 4), (1, 8), (8, 1)]
N = 16  # rows


@functools.cache
def on_mesh(mesh_shape):
    by_row, by_vocab = SPECS["tokens"], SPECS["last_logits"]
    return jax.jit(
        jax.shard_map(
            process_logits,
            mesh=make_mesh(*mesh_shape),
            in_specs=(by_vocab, SLOT_SPECS, by_row, by_row),
            out_specs=by_vocab,
            check_vma=False,
        )
    )


def process(logits, cases, mesh_shape=(1, 1)):
    """Rows (R, V) as they are chosen from. Row i of a shard has slot (i + 1) % rows of the shard."""
    n_rows, vocab = logits.shape
    width = padded(vocab, mesh_shape[1])
    wide = np.pad(logits.astype(np.float32), ((0, 0), (0, width - vocab)), constant_values=-np.inf)
    of_shard = n_rows // mesh_shape[0]
    slot_R = (np.arange(n_rows, dtype=np.int32) + 1) % of_shard
    in_slots = [None] * n_rows
    for i, case in enumerate(cases):
        in_slots[i // of_shard * of_shard + slot_R[i]] = case
    found = on_mesh(mesh_shape)(
        wide, spec.slot_arrays(in_slots, vocab, width), slot_R, pack_rows([case["params"] for case in cases])
    )
    assert (np.asarray(found)[:, vocab:] == -np.inf).all(), "padding is never chosen"
    return np.asarray(found)[:, :vocab]


def check(logits, cases, found):
    for row, case, ours in zip(logits, cases, found, strict=True):
        theirs = spec.processed(np.float32(row), **case)
        np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(theirs), str(case["params"]))
        finite = np.isfinite(theirs)
        np.testing.assert_allclose(ours[finite], theirs[finite], rtol=1e-6, atol=1e-5, err_msg=str(case["params"]))


def random_case(rng, vocab):
    bias = dict(zip(rng.choice(vocab, 20, replace=False).tolist(), rng.uniform(-100, 100, 20).tolist(), strict=True))
    params = SamplingParams(
        seed=0,
        presence_penalty=float(rng.choice([0, rng.uniform(-2, 2)])),
        frequency_penalty=float(rng.choice([0, rng.uniform(-2, 2)])),
        repetition_penalty=float(rng.choice([1, rng.uniform(0.1, 3), 100])),
        logit_bias=bias if rng.random() < 0.6 else None,
    )
    case = {"params": params, "prompt": rng.integers(0, vocab, 30).tolist()}
    case["generated"] = rng.integers(0, vocab // 3 + 1, rng.integers(0, 60)).tolist()
    if rng.random() < 0.5:
        case["allowed"] = np.flatnonzero(rng.random(vocab) < 0.3).tolist() or [0]
    return case


@pytest.mark.parametrize(("mesh_shape", "vocab"), list(zip(MESHES, (131, 130, 33, 64), strict=True)), ids=str)
def test_random_rows(mesh_shape, vocab):
    rng = np.random.default_rng(vocab)
    for _ in range(3):
        cases = [random_case(rng, vocab) for _ in range(N)]
        logits = 3 * rng.standard_normal((N, vocab))
        logits[:, ::7] = 0
        logits[0] = np.round(logits[0])
        check(logits, cases, process(logits, cases, mesh_shape))


def test_adversarial_logits():
    """Zeros of both signs, huge, tiny and infinite ones, under every penalty and its opposite."""
    values = [0.0, -0.0, 1e-30, -1e-30, 1.0, -1.0, 1e37, -1e37, -np.inf]
    logits = np.tile(np.repeat(np.float32(values), 4), (N, 1))  # each: unseen, in the prompt, generated, both
    vocab = logits.shape[1]
    seen = {"prompt": list(range(1, vocab, 4)) + list(range(3, vocab, 4))}
    seen["generated"] = [t for t in range(vocab) if t % 4 >= 2] * 3
    settings = [
        {name: sign * value}
        for name, value in (("presence_penalty", 1.5), ("frequency_penalty", 0.75))
        for sign in (1, -1)
    ]
    settings += [{"repetition_penalty": r} for r in (0.5, 1.0, 2.0)]
    settings += [{**settings[0], **settings[2], "repetition_penalty": 1.3, "logit_bias": {i: 9.0 for i in range(12)}}]
    cases = [{"params": SamplingParams(seed=0, **settings[i % len(settings)]), **seen} for i in range(N)]
    check(logits, cases, process(logits, cases))


def row(vocab=40, **case):
    """The processed values of one row of a logit of 2, and of -2 for odd ids."""
    logits = np.where(np.arange(vocab) % 2, -2.0, 2.0)
    cases = [case] + [{"params": SamplingParams(seed=0)}] * (N - 1)
    found = process(np.tile(logits, (N, 1)), cases)
    np.testing.assert_array_equal(found[1:], np.tile(logits, (N - 1, 1)), "other rows stay as they are")
    return found[0]


class TestByHand:
    def test_repetition_looks_at_prompt_and_answer_once(self):
        found = row(params=SamplingParams(seed=0, repetition_penalty=4.0), prompt=[0, 1, 4], generated=[2, 3, 4, 4])
        assert found[:7].tolist() == [0.5, -8.0, 0.5, -8.0, 0.5, -2.0, 2.0]

    def test_presence_and_frequency_look_at_the_answer(self):
        seen = {"prompt": [0, 0, 1], "generated": [2, 2, 2, 3, 1]}
        found = row(params=SamplingParams(seed=0, presence_penalty=0.5, frequency_penalty=1.0), **seen)
        assert found[:5].tolist() == [2.0, -3.5, -1.5, -3.5, 2.0]

    def test_bias_comes_before_the_penalties(self):
        """A negative logit that a bias made positive is divided."""
        params = SamplingParams(
            seed=0, repetition_penalty=2.0, presence_penalty=1.0, logit_bias={1: 6.0, 2: -6.0, 5: 3}
        )
        found = row(params=params, prompt=[1], generated=[2])
        assert found[:6].tolist() == [2.0, 2.0, -9.0, -2.0, 2.0, 1.0]

    def test_the_mask_comes_last(self):
        params = SamplingParams(seed=0, logit_bias={3: 100.0, 4: 1.0})
        found = row(params=params, allowed=[4, 32, 39])
        expected = np.full(40, -np.inf)
        expected[[4, 32, 39]] = 3.0, 2.0, -2.0
        np.testing.assert_array_equal(found, expected)

    def test_all_the_biases_there_may_be(self):
        bias = {t: float(t % 7) for t in range(300)}
        found = row(vocab=320, params=SamplingParams(seed=0, logit_bias=bias))
        plain = np.where(np.arange(320) % 2, -2.0, 2.0)
        np.testing.assert_array_equal(found, plain + [bias.get(t, 0.0) for t in range(320)])
