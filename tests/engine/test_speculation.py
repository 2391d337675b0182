"""Speculation: whatever the guesses are, an answer is that of plain decoding, token for token."""

import collections
import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hf_reference import distance
from scipy import stats

from sharded_llama.config import LlamaConfig
from sharded_llama.engine.compilation import CompileCounter
from sharded_llama.engine.engine import Engine
from sharded_llama.engine.llm import LLM
from sharded_llama.engine.loading import LoadedModel, load_model
from sharded_llama.engine.options import EngineOptions
from sharded_llama.errors import ConfigError
from sharded_llama.mesh import make_mesh
from sharded_llama.sampling import SamplingParams
from sharded_llama.sampling.structured import StructuredOutputs
from sharded_llama.weights import XfmrWeights, init_weights

# The engines of a kind are compiled alike, and what is compared is what they give.
pytestmark = pytest.mark.usefixtures("quick_compiler")

LONGEST, STOPS = 96, (7, 8)
CONFIG = LlamaConfig(
    dim=32,
    n_layers=2,
    n_heads=8,
    n_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    vocab_size=31,
    norm_eps=1e-5,
    rope_theta=1e4,
    dtype="float32",
    max_seq_len=LONGEST,
    eos_ids=STOPS,
)
# Pages run out before rows do, so that there are preemptions and yet rows for guesses.
OPTIONS = {"max_num_seqs": 16, "max_num_batched_tokens": 48, "num_pages": 9}
N_GUESSES = 4
EXACT = {"deterministic": True, "max_num_batched_tokens": None}


class Answer(NamedTuple):
    tokens: tuple[int, ...]
    reason: str
    logprobs: tuple  # of TokenLogprob; empty if not asked for
    prompt_logprobs: tuple


@functools.cache
def weights_of(config: LlamaConfig, mesh_shape: tuple[int, int], seed: int = 0) -> XfmrWeights:
    """Random weights large enough for logits that differ; the same on every mesh."""
    weights = init_weights(jax.random.key(seed), config, mesh=make_mesh(*mesh_shape))
    return jax.jit(lambda w: jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, w))(weights)


def draft_of(kind: str, mesh_shape: tuple[int, int]) -> tuple[LlamaConfig, XfmrWeights]:
    weights, one_layer = weights_of(CONFIG, mesh_shape), CONFIG.replace(n_layers=1)
    if kind == "itself":
        return CONFIG, weights
    if kind == "another":
        return one_layer, weights_of(one_layer, mesh_shape, seed=1)
    assert kind == "truncated"
    return one_layer, weights._replace(layers=weights.layers[:1])


def make_engine(mesh_shape: tuple[int, int] = (1, 1), draft: str | None = None, **options) -> Engine:
    data = mesh_shape[0]
    merged = {**OPTIONS, **options}
    merged |= {name: merged[name] and data * merged[name] for name in ("max_num_seqs", "max_num_batched_tokens")}
    return Engine(
        CONFIG,
        make_mesh(*mesh_shape),
        weights_of(CONFIG, mesh_shape),
        EngineOptions(**merged),
        draft=draft and draft_of(draft, mesh_shape),
    )


class Watch:
    """What happened to the guesses of an engine."""

    def __init__(self, engine: Engine):
        self.seen = collections.Counter()
        self._update = engine._scheduler.update
        engine._scheduler.update = self.update

    def update(self, plan, tokens, n_right=None):
        read = self._update(plan, tokens, n_right)
        of = {id(seq): (n, right) for seq, n, right in zip(plan.rows, plan.n_tokens, n_right or [0] * 99, strict=False)}
        for seq, new in read:
            n_tokens, right = of[id(seq)]
            self.seen["whole"] += n_tokens > 1 and right == n_tokens - 1
            self.seen["wrong"] += right < n_tokens - 1
            self.seen["stops within"] += seq.finish_reason == "stop" and len(new) <= right
            self.seen["fills up"] += seq.finish_reason == "length" and len(new) > 1
        self.seen["beside others"] += n_right is not None and any(map(any, plan.chunks))
        return read


def run(engine: Engine, cases: dict) -> dict:
    """The answers by name and index. The books are checked after every step."""
    parts, reasons, n_drafted, n_accepted = {}, {}, 0, 0
    before = engine.stats().scheduler
    for name, (prompt, params) in cases.items():
        engine.add_request(name, prompt, params)
    while engine.has_unfinished:
        for delta in engine.step():
            key = delta.request_id, delta.index
            assert key not in reasons, "a delta after the last"
            assert delta.error is None
            tokens, logprobs, of_prompt = parts.setdefault(key, ([], [], []))
            tokens += delta.token_ids
            logprobs += delta.logprobs or ()
            of_prompt += delta.prompt_logprobs or ()
            if delta.finish_reason:
                reasons[key] = delta.finish_reason
            if delta.speculation is not None:
                assert delta.finish_reason
                assert delta.speculation.accepted <= min(delta.speculation.drafted, len(tokens) + N_GUESSES)
                n_drafted += delta.speculation.drafted
                n_accepted += delta.speculation.accepted
        engine._scheduler.check()
    after = engine.stats().scheduler
    assert after.pages_used == 0
    # Every answer says how many guesses it had; together they are the engine's.
    assert after.drafted_tokens - before.drafted_tokens == n_drafted
    assert after.accepted_tokens - before.accepted_tokens == n_accepted
    return {key: Answer(tuple(part[0]), reasons[key], *map(tuple, part[1:])) for key, part in parts.items()}


def text(answers: dict) -> dict:
    return {key: answer[:2] for key, answer in answers.items()}


def make_cases() -> dict:
    """Greedy and sampled, with and without what forbids speculation; many prompts begin alike, and repeat themselves."""
    rng = np.random.default_rng(0)
    stem = rng.integers(9, CONFIG.vocab_size, 33).tolist()
    cases = {}
    for i in range(36):
        prompt = stem[: rng.integers(17, 34)] if i % 3 == 0 else 3 * rng.integers(9, CONFIG.vocab_size, 1 + i % 9).tolist()
        kind = {"temperature": 0.0} if i % 2 == 0 else {"temperature": (0.7, 1.0)[i // 2 % 2], "seed": i}
        kind |= {"ignore_eos": i % 4 < 2, "max_tokens": int(rng.integers(1, 40)), "n": 2 if i % 7 == 0 else 1}
        if i % 5 == 0:
            kind["logprobs"] = i % 3
        if i % 11 == 3:
            kind["prompt_logprobs"] = 1
        kind |= {
            6: {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
            9: {"allowed_token_ids": range(5, 25)},
            13: {"min_tokens": 12},
            20: {"presence_penalty": 0.5},
            21: {"top_p": 0.8, "logit_bias": {11: 2.0, 7: -5.0}},
            25: {"top_k": 3, "min_p": 0.05},
        }.get(i, {})
        kind["max_tokens"] = max(kind["max_tokens"], kind.get("min_tokens", 1))
        cases[f"r{i}"] = prompt, SamplingParams(**kind)
    return cases


CASES = make_cases()
NOT_SPECULATED = {"r6", "r9", "r13", "r20"}


@functools.cache
def plain(mesh_shape: tuple[int, int] = (1, 1), exact: bool = False) -> dict:
    """The answers without speculation."""
    return run(make_engine(mesh_shape, **(EXACT if exact else {"decode_steps": 1})), CASES)


# Which share of the guesses is right, at least and at most: a model guesses its own tokens, but not what a bias makes
# of them.
SHARES = {None: (0.05, 0.9), "itself": (0.9, 0.99), "another": (0.0, 0.4), "truncated": (0.0, 0.4)}


@pytest.mark.parametrize("draft", [None, "itself"])
@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 2)], ids=str)
def test_the_text_is_that_of_plain_decoding(mesh_shape, draft):
    """With chunks of prompts beside the guesses, preemptions and prefixes that are cached."""
    engine = make_engine(mesh_shape, draft, num_speculative_tokens=N_GUESSES)
    watch = Watch(engine)
    answers, expected = run(engine, CASES), plain()
    assert text(answers) == text(expected)
    for key in answers:
        found, wanted = (of[key].logprobs + of[key].prompt_logprobs for of in (answers, expected))
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert distance([ours.logprob], [theirs.logprob]) < 1e-4
                assert (ours.rank, [t for t, _ in ours.top]) == (theirs.rank, [t for t, _ in theirs.top])
    check_shares(engine, draft)
    assert min(watch.seen[what] for what in ("wrong", "whole", "beside others", "fills up")) > 0, watch.seen
    assert draft is None or watch.seen["stops within"] > 0


@pytest.mark.parametrize(
    ("mesh_shape", "draft"),
    [((1, 1), None), ((1, 1), "another"), ((1, 1), "truncated"), ((1, 8), None), ((1, 8), "itself")],
    ids=str,
)
def test_deterministic_answers_are_equal_bit_for_bit(mesh_shape, draft):
    """Text and log-probabilities; and on meshes of several devices the text of one."""
    engine = make_engine(mesh_shape, draft, num_speculative_tokens=N_GUESSES, **EXACT)
    answers = run(engine, CASES)
    assert answers == plain(mesh_shape, exact=True)
    assert text(answers) == text(plain())
    check_shares(engine, draft)


def check_shares(engine, draft):
    found, (least, most) = engine.stats().scheduler, SHARES[draft]
    print(draft, found)
    assert found.preemptions > 0
    assert found.cached_tokens > 0
    assert least <= found.accepted_tokens / found.drafted_tokens <= most
