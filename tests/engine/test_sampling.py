"""Sampling parameters in the engine, end to end: every request gets what it asks for, and no other notices."""

import contextlib
import dataclasses
import functools
import json
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from sampling import sampler_spec as spec

from sharded_llama.config import LlamaConfig
from sharded_llama.engine.compilation import CompileCounter
from sharded_llama.engine.engine import Engine
from sharded_llama.engine.llm import LLM
from sharded_llama.engine.loading import LoadedModel, load_model
from sharded_llama.errors import RequestError
from sharded_llama.mesh import make_mesh
from sharded_llama.sampling import SamplingParams
from sharded_llama.sampling.entropy_settings import EntropySettings
from sharded_llama.sampling.structured import StructuredOutputs
from sharded_llama.weights import init_weights

VOCAB, EOS, LONGEST = 1024, 1, 96
CONFIG = LlamaConfig(
    dim=32,
    n_layers=1,
    n_heads=8,
    n_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    vocab_size=VOCAB,
    norm_eps=1e-5,
    rope_theta=1e4,
    dtype="float32",
    max_seq_len=LONGEST,
    eos_ids=(EOS,),
)
RNG = np.random.default_rng(0)
STEM = RNG.integers(3, VOCAB, 33).tolist()  # two pages and one token
# Kinds of engine: with chunks and several steps of a dispatch; with one kind of step alone, on one device and four.
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 20, "num_pages": 9, "decode_steps": 4}
ONE_STEP = {"deterministic": True, "max_num_seqs": 4, "num_pages": 9}
KINDS = {
    "several steps": ((1, 1), SMALL),
    "one step": ((1, 1), {**ONE_STEP, "entropy_sampler": True}),
    "four devices": ((2, 2), {**ONE_STEP, "max_num_seqs": 8, "num_pages": 7}),
}


class Case(NamedTuple):
    prompt: list[int]
    params: SamplingParams


class Answer(NamedTuple):
    tokens: list[int]
    reason: str
    error: str | None
    prompt_logprobs: Any
    logprobs: list
    metrics: list


@functools.cache
def tokenizer():
    """Of the demo model, whose vocabulary this one has."""
    return load_model("demo", progress=False).tokenizer


@functools.cache
def model(mesh_shape):
    """Random weights large enough for logits that differ; the same on every mesh."""
    mesh = make_mesh(*mesh_shape)
    weights = init_weights(jax.random.key(0), CONFIG, mesh=mesh)
    weights = jax.jit(lambda w: jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, w))(weights)
    return LoadedModel(CONFIG, mesh, weights, tokenizer())


@functools.cache
def make_llm(kind):
    mesh_shape, options = KINDS[kind]
    return LLM(model(mesh_shape), progress=False, **options)


def run(engine, cases):
    """The answers to cases by name, by name and index. The scheduler's books are checked in every step."""
    found, reasons = {}, {}
    for name, case in cases.items():
        engine.add_request(name, case.prompt, case.params)
    while engine.has_unfinished:
        for delta in engine.step():
            answer = found.setdefault((delta.request_id, delta.index), Answer([], "", None, [], [], []))
            assert (delta.request_id, delta.index) not in reasons, "a delta after the last"
            answer.tokens.extend(delta.token_ids)
            answer.logprobs.extend(delta.logprobs or ())
            answer.metrics.extend(delta.metrics or ())
            answer.prompt_logprobs.extend(delta.prompt_logprobs or ())
            if delta.finish_reason:
                reasons[delta.request_id, delta.index] = delta.finish_reason, delta.error
        engine._scheduler.check()
    return {key: a._replace(reason=reasons[key][0], error=reasons[key][1]) for key, a in found.items()}


def tokens_of(answers):
    return {key: (answer.tokens, answer.reason) for key, answer in answers.items()}


# Greedy requests whose logits are changed


def greedy(max_tokens, **kwargs):
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **kwargs)


def changed_cases():
    """Every change alone and together; some prompts share a prefix, and some answers have a twin."""
    some = RNG.integers(3, VOCAB, 12).tolist()
    favoured = {int(t): float(4 + i % 3) for i, t in enumerate(RNG.integers(3, VOCAB, 30))}
    lasting = {"ignore_eos": True}
    cases = {
        "repetition": Case(STEM, greedy(24, repetition_penalty=1.8, **lasting)),
        "presence": Case(some, greedy(20, presence_penalty=2.0, **lasting)),
        "frequency": Case([*STEM, 7], greedy(22, frequency_penalty=1.5, n=2, **lasting)),
        "reward": Case([*STEM, 8], greedy(9, frequency_penalty=-2.0, **lasting)),
        "bias": Case(some[:5], greedy(12, logit_bias=favoured, repetition_penalty=1.3, **lasting)),
        "end": Case([5], greedy(12, logit_bias={EOS: 100.0}, min_tokens=7)),
        "own end": Case([*STEM, 9], greedy(12, logit_bias={50: 100.0}, stop_token_ids=[50], min_tokens=5)),
        "no length": Case([6], greedy(12, logit_bias={EOS: 100.0})),
        "allowed": Case([*STEM[:20], 4], greedy(15, allowed_token_ids=[40, 41, 900, VOCAB - 1], frequency_penalty=0.5)),
        "allowed twice": Case(some[3:], greedy(6, allowed_token_ids=[300, 301, EOS], min_tokens=4, n=2)),
        # One token of the word draws, then the other: it must not come right behind.
        "banned": Case([8, 9], greedy(14, bad_words=["king"], logit_bias={76: 50.0, 297: 60.0}, frequency_penalty=2.0)),
        "banned token": Case([*STEM, 3], greedy(10, bad_words=["the"], logit_bias={268: 30.0, 911: 40.0}, **lasting)),
        "everything": Case(
            STEM[:30],
            greedy(
                25,
                presence_penalty=1.0,
                frequency_penalty=0.3,
                repetition_penalty=1.2,
                logit_bias=favoured,
                allowed_token_ids=[*range(2, 600), EOS],
                bad_words=["a b", "king"],
                min_tokens=20,
            ),
        ),
    }
    plain = {f"plain{i}": Case([*STEM[: 10 * i], 3 + i], greedy(5 + 6 * i, **lasting)) for i in range(4)}
    return cases, plain


@functools.cache
def bad_sequences(words):
    texts = [text for word in words for text in (word, " " + word)]
    return [tuple(tokenizer().encode(text)) for text in texts]


def permitted(params, generated):
    """Which tokens may come next; None: all."""
    allowed = set(range(VOCAB)) if params.allowed_token_ids is None else set(params.allowed_token_ids)
    if len(generated) < params.min_tokens:
        allowed -= {EOS, *params.stop_token_ids}
    for *before, last in bad_sequences(params.bad_words):
        if before == generated[len(generated) - len(before) :]:
            allowed.discard(last)
    return sorted(allowed)


def expected_answers(cases):
    """Token by token from the logits of whole sequences, all requests beside one another."""
    llm = LLM(model((1, 1)), progress=False)
    generated = {name: [] for name in cases}
    reasons = dict.fromkeys(cases)
    while not all(reasons.values()):
        batch = np.zeros((len(cases), LONGEST), np.int32)
        for row, (name, case) in zip(batch, cases.items(), strict=True):
            sequence = case.prompt + generated[name]
            row[: len(sequence)] = sequence
        logits = np.asarray(llm.forward(batch))
        for row, (name, (prompt, params)) in zip(logits, cases.items(), strict=True):
            answer = generated[name]
            if reasons[name]:
                continue
            z = row[len(prompt) + len(answer) - 1]
            answer.append(int(np.argmax(spec.processed(z, params, prompt, answer, permitted(params, answer)))))
            if answer[-1] in params.stop_token_ids or (answer[-1] == EOS and not params.ignore_eos):
                reasons[name] = "stop"
            elif len(answer) == params.max_tokens:
                reasons[name] = "length"
    return {(name, i): (generated[name], reasons[name]) for name in cases for i in range(cases[name].params.n)}


@pytest.fixture(scope="module")
def changed():
    """Changed and plain cases, and what each gives."""
    changed, plain = changed_cases()
    return changed, plain, expected_answers({**changed, **plain})


def test_the_changes_change_something(changed):
    """Each changed case would have another answer without its changes."""
    cases, _, expected = changed
    of_words = ("banned", "banned token")
    names = ("max_tokens", "ignore_eos", "temperature")
    bare = {
        name: Case(c.prompt, SamplingParams(**{n: getattr(c.params, n) for n in names})) for name, c in cases.items()
    }
    unbanned = {
        name + " but for words": Case(case.prompt, dataclasses.replace(case.params, bad_words=()))
        for name, case in cases.items()
        if case.params.bad_words
    }
    without = expected_answers({**bare, **unbanned})
    for name in set(cases) - set(of_words):
        assert expected[name, 0][0] != without[name, 0][0], name
    for name in of_words:
        assert expected[name, 0][0] != without[name + " but for words", 0][0], name
    assert expected["end", 0][0][7:] == [EOS]
    assert expected["own end", 0][0][5:] == [50]
    assert expected["no length", 0] == ([EOS], "stop")


@contextlib.contextmanager
def preempted(engine):
    """The names of requests that lose their pages after they have said something."""
    names, preempt = set(), engine._scheduler._preempt

    def noted(seq):
        if seq.n_generated:
            names.add(seq.request_id)
        preempt(seq)

    engine._scheduler._preempt = noted
    yield names
    engine._scheduler._preempt = preempt


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_requests_equal_the_specification(changed, kind):
    """Together with plain ones in too few pages, in another order, alone; and plain ones in their slots afterwards."""
    cases, plain, expected = changed
    engine = make_llm(kind).engine
    together = {**cases, **plain}
    lasting = {name: cases[name] for name in ("repetition", "frequency", "presence", "own end", "everything")}
    orders = [together, dict(reversed(together.items())), lasting, dict(reversed(lasting.items()))]
    with preempted(engine) as names:
        for order in orders:
            found = tokens_of(run(engine, order))
            assert found == {key: of for key, of in expected.items() if key[0] in order}
    assert len(names & {"repetition", "frequency", "presence", "everything"}) >= 1
    assert engine.stats().scheduler.cached_tokens > 0
    for name in ("frequency", "everything", "banned"):
        alone = tokens_of(run(engine, {name: cases[name]}))
        assert alone == {key: expected[key] for key in alone}
    again = tokens_of(run(engine, plain))
    assert again == {key: expected[key] for key in again}


# Seeds

SEEDED = {
    "plain": Case(STEM[:21], SamplingParams(seed=5, max_tokens=12, ignore_eos=True)),
    "filtered": Case(
        STEM[:7], SamplingParams(seed=-6, temperature=1.4, top_k=300, top_p=0.9, min_p=0.001, max_tokens=9)
    ),
    "penalised": Case(
        [*STEM, 5],
        SamplingParams(seed=2**63, presence_penalty=1.0, repetition_penalty=1.4, max_tokens=14, ignore_eos=True),
    ),
    "biased": Case([9], SamplingParams(seed=8, logit_bias={7: 3.0}, allowed_token_ids=range(500), max_tokens=8)),
}


@pytest.fixture(scope="module")
def seeded():
    engine = make_llm("one step").engine
    return {key: of for name in SEEDED for key, of in tokens_of(run(engine, {name: SEEDED[name]})).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_in_any_company(changed, seeded, kind):
    engine = make_llm(kind).engine
    others, plain, expected = changed
    few = {name: others[name] for name in ("repetition", "end", "banned")}
    for company in ({}, few, plain):
        found = tokens_of(run(engine, {**company, **SEEDED}))
        assert found == {**{key: of for key, of in expected.items() if key[0] in company}, **seeded}


@pytest.mark.parametrize("mesh_shape", [(4, 2), (1, 8)], ids=str)  # tests/engine/test_llm.py has the others
def test_a_seed_gives_the_same_on_other_meshes(seeded, mesh_shape):
    """In float32."""
    options = {**ONE_STEP, "max_num_seqs": 2 * mesh_shape[0], "max_num_batched_tokens": 16 * mesh_shape[0]}
    engine = LLM(model(mesh_shape), progress=False, **options).engine
    assert tokens_of(run(engine, SEEDED)) == seeded


def test_answers_of_one_seed_differ_and_share_the_prompt():
    """The same three again; each is what its own seed gives; the prompt's full pages are there once."""
    engine = make_llm("several steps").engine
    params = SamplingParams(seed=11, n=3, max_tokens=10, ignore_eos=True)
    engine.add_request("n", STEM, params)
    while not all(s.slot >= 0 for s in engine._sequences["n"]):
        engine.step()
    first, *others = (s.pages for s in engine._sequences["n"])
    for pages in others:
        assert pages[:2] == first[:2]
        assert not set(pages[2:]) & set(first)
    assert engine.stats().scheduler.pages_used <= 2 + 3 * 2
    engine.abort("n")
    while engine.has_unfinished:
        engine.step()
    answers = [answer.tokens for answer in run(engine, {"n": Case(STEM, params)}).values()]
    assert len({tuple(tokens) for tokens in answers}) == 3
    ones = {str(i): Case(STEM, dataclasses.replace(params, n=1, seed=11 + i)) for i in range(3)}
    assert sorted(answer.tokens for answer in run(engine, ones).values()) == sorted(answers)


# Log-probabilities of prompts


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_logprobs_are_those_of_the_whole_sequence(kind):
    """Of short and long prompts, in several chunks and steps, with the prefix cached before, among other requests."""
    llm = make_llm(kind)
    engine, whole = llm.engine, LLM(model((1, 1)), progress=False)
    long = RNG.integers(3, VOCAB, 70).tolist()
    cases = {
        "other": Case([*STEM, 20], greedy(3)),
        # Answers of one token: to go on would be to compile more.
        "again": Case([*STEM, 21], greedy(1, prompt_logprobs=2)),
        "long": Case(long, SamplingParams(seed=1, max_tokens=1, prompt_logprobs=20, logprobs=1, presence_penalty=1.0)),
        "none": Case(long[:18], greedy(2, prompt_logprobs=0)),
        "one token": Case([9], greedy(1, prompt_logprobs=3)),
        "two answers": Case(long[5:12], SamplingParams(seed=2, n=2, max_tokens=1, prompt_logprobs=1)),
    }
    run(engine, {"before": Case(STEM, greedy(1))})
    answers = run(engine, cases)
    batch = np.zeros((len(cases), LONGEST), np.int32)
    for row, case in zip(batch, cases.values(), strict=True):
        row[: len(case.prompt)] = case.prompt
    exact = spec.log_softmax(np.asarray(whole.forward(batch)))
    for (name, (prompt, params)), of_model in zip(cases.items(), exact, strict=True):
        found = answers[name, 0].prompt_logprobs
        if params.prompt_logprobs is None:
            assert found == []
            continue
        assert len(found) == len(prompt)
        assert found[0] is None
        assert [p.logprob for p in found[1:]] == pytest.approx(
            of_model[np.arange(len(prompt) - 1), prompt[1:]].tolist(), rel=1e-4, abs=1e-4
        )
        for at, p in enumerate(found[1:]):
            row = of_model[at]
            assert abs(p.rank - 1 - (row > row[prompt[at + 1]]).sum()) <= 1, "near ties may turn"
            assert [v for _, v in p.top] == pytest.approx(-np.sort(-row)[: params.prompt_logprobs], rel=1e-4, abs=1e-4)
            assert [row[t] for t, _ in p.top] == pytest.approx([v for _, v in p.top], rel=1e-4, abs=1e-4)
    assert answers["two answers", 1].prompt_logprobs == []
    assert len(answers["long", 0].logprobs) == 1
    # Looking at the prompt changes nothing of what is said.
    unasked = {n: Case(c.prompt, dataclasses.replace(c.params, prompt_logprobs=None)) for n, c in cases.items()}
    assert tokens_of(run(engine, unasked)) == tokens_of(answers)


# Logits that are no numbers


@pytest.mark.parametrize("kind", ["several steps", "four devices"])
def test_a_request_whose_logits_are_no_numbers_ends_alone(changed, kind):
    """A token of this model is NaN. Who ends a prompt with it gets an error; the others do not notice."""
    cases, plain, expected = changed
    others = {name: {**cases, **plain}[name] for name in ("repetition", "plain1", "plain3", "bias", "end")}
    harmless = {t for name in others for t in (*others[name].prompt, *expected[name, 0][0])}
    token = next(t for t in range(3, VOCAB) if t not in harmless)
    engine = make_llm(kind).engine
    weights = engine.runner.weights
    table = np.array(weights.tok_embeddings)
    table[token] = np.nan
    spoilt = weights._replace(tok_embeddings=jax.device_put(table, weights.tok_embeddings.sharding))
    bad = {
        "first": Case([5, token], greedy(5)),
        "sampled": Case([*STEM, token], SamplingParams(seed=1, max_tokens=5, frequency_penalty=1.0)),
        # The token is said, and what would follow it is not a number.
        "later": Case([5, 6], greedy(9, logit_bias={token: 100.0}, min_tokens=9)),
        "two": Case([7, token], greedy(5, n=2)),
    }
    try:
        engine.runner.weights = spoilt
        answers = run(engine, {**bad, **others})
    finally:
        engine.runner.weights = weights
    for (name, _), answer in answers.items():
        if name in bad:
            assert (answer.reason, answer.tokens) == ("error", [token] if name == "later" else [])
            assert answer.error == "the model's logits for the next token are not numbers"
        else:
            assert answer.error is None
    found = tokens_of({key: answer for key, answer in answers.items() if key[0] in others})
    assert found == {key: expected[key] for key in found}
    assert len(answers) == len(bad) + 1 + len(others)


# Forms of answers

FORMS = {
    "regex": StructuredOutputs(regex=r"[0-9]{3}-[a-z]{2,5}"),
    "choice": StructuredOutputs(choice=["yes", "no", "perhaps tomorrow"]),
    "json": StructuredOutputs(
        json={
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 6}, "old": {"type": "boolean"}},
            "required": ["name", "old"],
            "additionalProperties": False,
        },
        disable_any_whitespace=True,
    ),
    "grammar": StructuredOutputs(grammar='start: "<" /[ab]{1,4}/ ">"'),
}


def is_of_form(name, text):
    if name == "json":
        value = json.loads(text)
        return set(value) == {"name", "old"} and isinstance(value["old"], bool) and len(value["name"]) <= 6
    patterns = {"regex": FORMS["regex"].regex, "choice": "yes|no|perhaps tomorrow", "grammar": "<[ab]{1,4}>"}
    return re.fullmatch(patterns[name], text) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_constrained_answers_have_their_form(changed, seeded, kind):
    """At a high temperature, among plain requests whose answers stay as they are without them."""
    engine = make_llm(kind).engine
    plain, expected = changed[1:]
    constrained = {
        f"{name} {i}": Case([3 + i, 4], SamplingParams(temperature=1.5, seed=i, max_tokens=50, structured_outputs=form))
        for name, form in FORMS.items()
        for i in range(2)
    }
    constrained["regex n"] = Case(
        [5], SamplingParams(temperature=1.5, seed=3, n=2, max_tokens=50, structured_outputs=FORMS["regex"])
    )
    cases = [*constrained.items(), *plain.items(), *SEEDED.items()]
    answers = run(engine, dict(cases[i] for i in np.random.default_rng(1).permutation(len(cases))))
    texts = set()
    for (name, index), answer in answers.items():
        if name in constrained:
            assert answer.reason == "stop"
            assert answer.tokens[-1] == EOS
            texts.add(text := tokenizer().decode(answer.tokens[:-1]))
            assert is_of_form(name.split()[0], text), (name, index, text)
    assert len(texts) >= 8, "drawn freely within their forms"
    found = tokens_of({key: answer for key, answer in answers.items() if key[0] not in constrained})
    assert found == {**{key: of for key, of in expected.items() if key[0] in plain}, **seeded}


def test_a_form_that_is_cut_short_is_a_beginning_of_it():
    engine = make_llm("several steps").engine
    params = SamplingParams(
        temperature=1.5, seed=1, max_tokens=3, structured_outputs=StructuredOutputs(regex="[0-9]{40}")
    )
    (answer,) = run(engine, {"cut": Case([3], params)}).values()
    assert answer.reason == "length"
    assert re.fullmatch("[0-9]{3,39}", tokenizer().decode(answer.tokens))


# The entropy sampler


def test_the_entropy_sampler_beside_others(changed, seeded):
    """It gives metrics for each of its tokens, the same every time; other requests have none and are not changed."""
    engine = make_llm("one step").engine
    few = {name: changed[1][name] for name in ("plain1", "plain2")}
    chosen = {
        "entropy": Case(STEM, SamplingParams(seed=4, max_tokens=15, entropy=EntropySettings(), ignore_eos=True)),
        "greedy": Case([4], SamplingParams(max_tokens=6, entropy=EntropySettings(temperature=0.0), ignore_eos=True)),
    }
    answers = run(engine, {**chosen, **few, **SEEDED})
    for (name, _), answer in answers.items():
        assert len(answer.metrics) == (len(answer.tokens) if name in chosen else 0)
    found = tokens_of(answers)
    plain = expected_answers({"greedy": Case([4], greedy(6, ignore_eos=True))})
    assert found["greedy", 0] == plain["greedy", 0]
    assert {m.temperature for m in answers["greedy", 0].metrics} == {0.0}
    assert all(m.entropy > 0 and m.attention_entropy >= 0 for m in answers["entropy", 0].metrics)
    others = {key: of for key, of in found.items() if key[0] not in chosen}
    assert others == {**{key: of for key, of in changed[2].items() if key[0] in few}, **seeded}
    alone = run(engine, {"entropy": chosen["entropy"]})
    assert alone["entropy", 0].tokens == answers["entropy", 0].tokens
    assert alone["entropy", 0].metrics == answers["entropy", 0].metrics, "bit for bit in a deterministic engine"
    logits = np.asarray(LLM(model((1, 1)), progress=False).forward([[*STEM, *answers["entropy", 0].tokens]]))[0]
    logp = spec.log_softmax(logits)[len(STEM) - 1 : -1]
    bits = -(np.exp(logp) * logp).sum(-1) / np.log(2)
    assert [m.entropy for m in answers["entropy", 0].metrics] == pytest.approx(bits.tolist(), rel=1e-4)


# What compiles, and what is refused


def test_nothing_compiles_after_start(changed):
    """Whatever is asked for, alone and together, with the entropy sampler too."""
    llm = make_llm("one step")
    llm.start()
    engine = llm.engine
    cases = {**changed[0], **changed[1], **SEEDED}
    for name, form in FORMS.items():
        cases[name] = Case([3], SamplingParams(temperature=1.5, seed=1, max_tokens=40, structured_outputs=form))
    cases["logprobs"] = Case(STEM, greedy(3, logprobs=20, prompt_logprobs=5))
    cases["many"] = Case(STEM, SamplingParams(seed=1, n=4, max_tokens=8, logprobs=0))
    cases["entropy"] = Case(STEM, SamplingParams(seed=1, max_tokens=8, entropy=EntropySettings(pause_token=5)))
    counter, n_compiled = CompileCounter(), engine.runner.n_compiled
    run(engine, cases)
    for name in ("everything", "entropy", "json", "plain1", "plain", "logprobs", "many"):
        run(engine, {name: cases[name]})
    assert (counter.count, engine.runner.n_compiled) == (0, n_compiled)


@pytest.fixture(scope="module")
def bare_engine():
    """Without a tokenizer, and without the entropy sampler."""
    return LLM(dataclasses.replace(model((1, 1)), tokenizer=None), progress=False, **SMALL).engine


class TestRefusals:
    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"stop_token_ids": [3, VOCAB]}, "stop_token_ids: token id 1024 is outside the vocabulary of 1024 tokens"),
            ({"logit_bias": {3: 1.0, 5000: 1.0}}, "logit_bias: token id 5000 is outside"),
            ({"allowed_token_ids": [VOCAB + 1]}, "allowed_token_ids.* 1025"),
            ({"structured_outputs": FORMS["regex"]}, "structured_outputs needs a tokenizer"),
            ({"bad_words": ["a"]}, "bad_words need a tokenizer"),
            ({"entropy": EntropySettings()}, "the entropy sampler is off: .*entropy_sampler=True"),
            ({"allowed_token_ids": [EOS], "min_tokens": 1}, "allowed_token_ids without any that"),
        ],
        ids=str,
    )
    def test_of_what_the_engine_lacks(self, bare_engine, asked, message):
        engine: Engine = bare_engine
        with pytest.raises(RequestError, match=message):
            engine.add_request("a", [5], SamplingParams(**asked))
        assert not engine.has_unfinished
        engine.add_request("a", [5], greedy(1))  # the name is still free
        engine.abort("a")
        assert [d.finish_reason for d in engine.step()] == ["abort"]

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"entropy": EntropySettings(pause_token=VOCAB)}, "pause_token=1024 is outside the vocabulary of 1024"),
            ({"structured_outputs": StructuredOutputs(regex="(")}, "structured_outputs.regex"),
            (
                {"structured_outputs": FORMS["regex"], "allowed_token_ids": [300]},
                "without any that the grammar permits",
            ),
        ],
        ids=str,
    )
    def test_of_what_contradicts_the_model(self, asked, message):
        engine: Engine = make_llm("one step").engine
        with pytest.raises(RequestError, match=message):
            engine.add_request("a", [5], SamplingParams(**asked))
        assert not engine.has_unfinished
