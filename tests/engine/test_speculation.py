"""Speculation: whatever the guesses are, an answer is that of plain decoding, token for token."""

import collections
import functools
import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hf_reference import distance
from scipy import special, stats

import sharded_llama
from sharded_llama.config import LlamaConfig
from sharded_llama.engine.compilation import CompileCounter
from sharded_llama.engine.drafting import may_speculate
from sharded_llama.engine.engine import Engine
from sharded_llama.engine.llm import LLM
from sharded_llama.engine.loading import LoadedModel
from sharded_llama.engine.options import EngineOptions
from sharded_llama.errors import ConfigError
from sharded_llama.mesh import make_mesh
from sharded_llama.sampling import SamplingParams
from sharded_llama.sampling.entropy_settings import EntropySettings
from sharded_llama.sampling.structured import StructuredOutputs
from sharded_llama.tokenizer import load_tokenizer
from sharded_llama.weights import XfmrWeights, init_weights

DEMO = Path(sharded_llama.__file__).parent / "demo_checkpoint"
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
    """Greedy and sampled, with and without what forbids speculation; prompts begin alike, or repeat themselves."""
    rng = np.random.default_rng(0)
    stem = rng.integers(9, CONFIG.vocab_size, 33).tolist()
    cases = {}
    for i in range(31):
        prompt = (
            stem[: rng.integers(17, 34)] if i % 3 == 0 else 3 * rng.integers(9, CONFIG.vocab_size, 1 + i % 9).tolist()
        )
        kind = {"temperature": 0.0} if i % 2 == 0 else {"temperature": (0.7, 1.0)[i // 2 % 2], "seed": i}
        kind |= {"ignore_eos": i % 4 < 2, "max_tokens": int(rng.integers(1, 32)), "n": 2 if i % 7 == 0 else 1}
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


@pytest.mark.parametrize(("mesh_shape", "draft"), [((1, 1), None), ((2, 2), "itself")], ids=str)
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


@pytest.mark.parametrize("draft", [None, "another", "truncated"])
def test_deterministic_answers_are_equal_bit_for_bit(draft):
    """Text and log-probabilities."""
    engine = make_engine(draft=draft, num_speculative_tokens=N_GUESSES, **EXACT)
    answers = run(engine, CASES)
    assert answers == plain(exact=True)
    assert text(answers) == text(plain())
    check_shares(engine, draft)


@pytest.mark.parametrize(("mesh_shape", "draft"), [((2, 2), None), ((1, 8), None), ((1, 8), "itself")], ids=str)
def test_on_several_devices(mesh_shape, draft):
    few = dict(list(CASES.items())[:12])
    engine = make_engine(mesh_shape, draft, num_speculative_tokens=N_GUESSES, **EXACT)
    answers = text(run(engine, few))
    assert answers.items() <= text(plain()).items()
    assert len(answers) == 14
    assert engine.stats().scheduler.accepted_tokens > 20


def check_shares(engine, draft):
    found, (least, most) = engine.stats().scheduler, SHARES[draft]
    assert found.preemptions > 0
    assert found.cached_tokens > 0
    assert least <= found.accepted_tokens / found.drafted_tokens <= most


def test_a_model_that_guesses_keeps_up_where_there_is_no_room_for_guesses():
    """While every row is taken it computes what the others generate: after that its guesses are all right."""
    engine = make_engine(draft="itself", num_speculative_tokens=N_GUESSES, max_num_seqs=3, max_num_batched_tokens=19)
    params = {"temperature": 0.0, "ignore_eos": True}
    cases = {f"short{i}": ([10 + i, 9], SamplingParams(**params, max_tokens=20)) for i in range(2)}
    cases["long"] = [11, 12, 13], SamplingParams(**params, max_tokens=50)
    drafted_beside = []
    schedule = engine._scheduler.schedule

    def watched():
        plan = schedule()
        if plan and engine.stats().scheduler.running == 3:
            drafted_beside.append(any(map(any, plan.drafts)))
        return plan

    engine._scheduler.schedule = watched
    answers = run(engine, cases)
    assert len(drafted_beside) > 15
    assert not any(drafted_beside)
    found = engine.stats().scheduler
    assert found.drafted_tokens == found.accepted_tokens > 15
    for name, case in cases.items():
        assert text(run(engine, {name: case})) == {(name, 0): answers[name, 0][:2]}, "alone, with guesses all along"


def test_which_requests_are_speculated_on():
    """Others run beside them, as they would without; their answers say nothing of guesses."""
    may = {"top_p": 0.5, "top_k": 4, "min_p": 0.1, "logit_bias": {3: 1.0}, "logprobs": 2, "stop_token_ids": [5]}
    assert may_speculate(SamplingParams(**may, prompt_logprobs=1, n=3))
    for name, value in {
        "presence_penalty": 0.1,
        "frequency_penalty": -0.1,
        "repetition_penalty": 0.9,
        "allowed_token_ids": [1],
        "bad_words": ["a"],
        "min_tokens": 1,
        "structured_outputs": StructuredOutputs(regex="a"),
        "entropy": EntropySettings(),
    }.items():
        assert not may_speculate(SamplingParams(**{name: value})), name

    engine = make_engine(draft="itself", num_speculative_tokens=N_GUESSES, **EXACT)
    said = {}
    for name, (prompt, params) in CASES.items():
        engine.add_request(name, prompt, params)
    while engine.has_unfinished:
        said |= {delta.request_id: delta.speculation for delta in engine.step() if delta.finish_reason}
    assert {name for name, speculation in said.items() if speculation is None} == NOT_SPECULATED
    guessed = {name: of for name, of in said.items() if of is not None and of.drafted}
    assert len(guessed) > 15
    wrong = {name for name, of in guessed.items() if of.accepted < of.drafted}
    assert wrong == {"r21"}, "the guesses do not know of its bias; all others are the model's own"


def test_forms_and_words_beside_speculation():
    """Constraints that text decides, in an engine that speculates on others."""
    config, mesh = CONFIG.replace(vocab_size=1024, n_layers=1, eos_ids=(1,)), make_mesh(1, 1)
    weights, tokenizer = weights_of(config, (1, 1)), load_tokenizer(DEMO)
    repeated = [20, 21, 22, 23] * 5
    sampled, greedy = {"temperature": 1.0, "seed": 4, "max_tokens": 24}, {"temperature": 0.0, "max_tokens": 40}
    cases = {
        "regex": ([5, 6], SamplingParams(**sampled, structured_outputs=StructuredOutputs(regex="[0-9]{3}-[a-z]{2}"))),
        "choice": (
            repeated,
            SamplingParams(**greedy, structured_outputs=StructuredOutputs(choice=["yes, yes, yes", "no"])),
        ),
        "words": ([5, 7], SamplingParams(**sampled, bad_words=["the", "e"], n=2)),
        "biased": (repeated, SamplingParams(**greedy, ignore_eos=True, logit_bias=dict.fromkeys(range(20, 24), 60.0))),
        "free": (repeated, SamplingParams(**greedy, ignore_eos=True)),
    }

    def answers(**options):
        options = EngineOptions(max_num_seqs=8, num_pages=40, **EXACT, **options)
        engine = Engine(config, mesh, weights, options, tokenizer=tokenizer)
        return run(engine, cases), engine.stats().scheduler

    (expected, _), (found, of_engine) = answers(), answers(num_speculative_tokens=N_GUESSES, prompt_lookup_min=1)
    assert found == expected
    assert of_engine.drafted_tokens > 0
    assert re.fullmatch("[0-9]{3}-[a-z]{2}", tokenizer.decode([t for t in found["regex", 0].tokens if t != 1]))
    assert tokenizer.decode([t for t in found["choice", 0].tokens if t != 1]) in ("yes, yes, yes", "no")


def test_the_distribution_is_the_model_s():
    """The second and third token of many answers, which guesses decide, against the model's exact probabilities."""
    prompt, n_requests, n = [11, 23, 12], 70, 32
    # Pages for as many sequences as leave each two more rows.
    engine = make_engine(draft="another", num_speculative_tokens=2, max_num_seqs=3 * n, num_pages=n, **EXACT)
    cases = {
        str(i): (prompt, SamplingParams(seed=n * i, n=n, max_tokens=4, ignore_eos=True)) for i in range(n_requests)
    }
    tokens = np.array([answer.tokens for answer in run(engine, cases).values()])
    assert tokens.shape == (n_requests * n, 4)
    found = engine.stats().scheduler
    assert 0.02 < found.accepted_tokens / found.drafted_tokens < 0.9
    assert found.drafted_tokens > n_requests * n

    size = CONFIG.vocab_size
    llm = LLM(LoadedModel(CONFIG, engine.mesh, engine.runner.weights), progress=False)
    pairs = np.stack(np.meshgrid(range(size), range(size), indexing="ij"), -1).reshape(-1, 2)
    logits = llm.forward(np.concatenate([np.tile(prompt, (size * size, 1)), pairs], axis=1))
    p = special.softmax(np.asarray(logits[:, len(prompt) - 1 :], np.float64), -1).reshape(size, size, 3, size)
    first = p[0, 0, 0]
    p_12 = first[:, None] * p[:, 0, 1]
    p_3 = np.einsum("ab,abc->c", p_12, p[:, :, 2])
    p_23 = np.einsum("ab,abc->bc", p_12, p[:, :, 2])
    check_frequencies(tokens[:, 0], first)
    check_frequencies(tokens[:, 1], p_12.sum(0))
    check_frequencies(tokens[:, 2], p_3)
    check_frequencies(tokens[:, 0] * size + tokens[:, 1], p_12.ravel())
    check_frequencies(tokens[:, 1] * size + tokens[:, 2], p_23.ravel())
    with pytest.raises(AssertionError):
        check_frequencies(tokens[:, 1], first)


def check_frequencies(found, probabilities):
    """Pearson's chi-square; values that are expected fewer than five times count as one."""
    assert abs(probabilities.sum() - 1) < 1e-5
    expected = probabilities / probabilities.sum() * len(found)
    observed = np.bincount(found, minlength=len(expected))
    rare = expected < 5
    if rare.any():
        observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (observed, expected))
    assert len(expected) > 5, "there is something to choose from"
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_nothing_compiles_after_start():
    engine = make_engine(draft="itself", num_speculative_tokens=N_GUESSES, decode_steps=1)
    engine.compile(progress=False)
    both = engine.runner, engine._draft_runner
    counter, n_compiled = CompileCounter(), [runner.n_compiled for runner in both]
    assert text(run(engine, CASES)) == text(plain())
    assert engine.stats().scheduler.accepted_tokens > 0
    assert (counter.count, [runner.n_compiled for runner in both]) == (0, n_compiled)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"num_speculative_tokens": 2}, {"vocab_size": 30}, "the draft model has 30 tokens and the model 31"),
        ({}, {}, "a draft model needs num_speculative_tokens"),
        ({"num_speculative_tokens": 2}, {"max_seq_len": 64}, "was made for 64 tokens: give max_model_len=64 or less"),
        (
            {"num_speculative_tokens": 2, "entropy_sampler": True},
            None,
            "entropy_sampler does not go with num_speculative_tokens",
        ),
        ({"prompt_lookup_min": 5}, None, "prompt_lookup_min=5 must be at most prompt_lookup_max=4"),
        ({"num_speculative_tokens": 0}, None, "num_speculative_tokens=0 must be a whole number from 1 to 32"),
        ({"num_speculative_tokens": 33}, None, "num_speculative_tokens=33 must be a whole number from 1 to 32"),
        ({"prompt_lookup_max": True}, None, "prompt_lookup_max=True must be a whole number"),
    ],
)
def test_what_contradicts_itself(options, changes, message):
    mesh = make_mesh(1, 1)
    draft = None if changes is None else (CONFIG.replace(**changes), None)
    with pytest.raises(ConfigError, match=message):
        Engine(CONFIG, mesh, weights_of(CONFIG, (1, 1)), EngineOptions(**options), draft=draft)
