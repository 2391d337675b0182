"""The Python API: greedy text equals transformers', rows do not disturb one another, and mistakes are named."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers
import torch
from hf_reference import MODELS, distance, logits, make_model, save
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import sharded_llama
from sharded_llama.engine import llm as llm_module, loading
from sharded_llama.engine.deltas import Speculation, TokenDelta, TokenLogprob
from sharded_llama.engine.llm import LLM
from sharded_llama.engine.loading import LoadedModel
from sharded_llama.engine.outputs import Answers, RequestOutput, from_plain, to_plain
from sharded_llama.errors import CheckpointError, ConfigError, EngineError, MeshError, RequestError, TokenizerError
from sharded_llama.mesh import make_mesh
from sharded_llama.sampling import SamplingParams

SMALL = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 144,
    "decode_steps": 1,
    "progress": False,
}  # few shapes to compile
PROMPT_LENGTHS = (1, 3, 17, 8, 16)


def load(folder, **kwargs):
    return LLM(folder, **SMALL, **kwargs)


def generate(llm, *args, **kwargs):
    """The first answer to each prompt."""
    return [request.outputs[0] for request in llm.generate(*args, **kwargs)]


def prompts(vocab_size, lengths=PROMPT_LENGTHS):
    rng = np.random.default_rng(5)
    return [[1, *rng.integers(3, vocab_size, n - 1).tolist()] for n in lengths]


def their_greedy(model, ids, max_new_tokens):
    out = model.generate(
        torch.tensor([ids]),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        attention_mask=torch.ones(1, len(ids)),
    )
    return out[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a tokenizer, sharded over several files."""
    path = save(make_model("grouped", vocab_size=300), tmp_path_factory.mktemp("model"), max_shard_size="60KB")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, naïve 🙂 你好 " * 5], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def llm(folder):
    return load(folder, mesh=make_mesh(2, 4))


class TestGreedy:
    @pytest.mark.parametrize("mesh_shape", [(2, 1), (1, 2), (2, 4)], ids=str)
    def test_equals_transformers_for_a_batch_of_different_lengths(self, folder, mesh_shape):
        model = make_model("grouped", vocab_size=300)
        llm = load(folder, mesh=make_mesh(*mesh_shape))
        batch = prompts(300)
        ours = generate(llm, batch, max_tokens=24)
        for ids, answer in zip(batch, ours, strict=True):
            assert list(answer.token_ids) == their_greedy(model, ids, 24)

    @pytest.mark.parametrize("name", [n for n in MODELS if n != "grouped"])
    def test_other_models(self, name, tmp_path):
        model = make_model(name)
        folder = save(model, tmp_path)
        llm = load(folder, mesh=make_mesh(2, 4), skip_tokenizer=True)
        batch = prompts(MODELS[name]["vocab_size"])
        for ids, answer in zip(batch, generate(llm, batch, max_tokens=20), strict=True):
            assert list(answer.token_ids) == their_greedy(model, ids, 20)

    def test_a_row_does_not_depend_on_the_others(self, llm):
        alone = generate(llm, prompts(300)[1:2], max_tokens=12)[0]
        together = generate(llm, prompts(300), max_tokens=12)[1]
        assert alone.token_ids == together.token_ids


class TestLengths:
    def test_max_tokens_of_each_request(self, llm):
        batch = prompts(300)[:3]
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 7, 3)]
        answers = generate(llm, batch, params)
        assert [len(a.token_ids) for a in answers] == [1, 7, 3]
        assert {a.finish_reason for a in answers} == {"length"}

    def test_stops_at_an_end_of_sequence_token(self, llm):
        free = generate(llm, [prompts(300)[2]], max_tokens=12, ignore_eos=True)[0]
        eos = free.token_ids[5]
        first = free.token_ids.index(eos)
        changed = LLM(LoadedModel(llm.config.replace(eos_ids=(eos, 2)), llm.mesh, llm.weights, llm.tokenizer), **SMALL)
        answer = generate(changed, [prompts(300)[2]], max_tokens=12)[0]
        assert answer.finish_reason == "stop"
        assert answer.token_ids == free.token_ids[: first + 1]
        assert generate(changed, [prompts(300)[2]], max_tokens=12, ignore_eos=True)[0].token_ids == free.token_ids

    def test_ends_at_the_end_of_the_context(self, llm):
        room = 5
        ids = prompts(300, (llm.config.max_seq_len - room,))
        answer = generate(llm, ids, max_tokens=100, ignore_eos=True)[0]
        assert (len(answer.token_ids), answer.finish_reason) == (room, "length")

    def test_the_last_position_of_the_context_is_right(self, folder):
        """Token by token up to the very end equals transformers."""
        model = make_model("grouped", vocab_size=300)
        llm = load(folder, mesh=make_mesh(1, 2))
        ids = prompts(300, (6,))
        answer = generate(llm, ids, max_tokens=1000, ignore_eos=True)[0]
        assert len(answer.token_ids) == llm.config.max_seq_len - 6
        sequence = torch.tensor([ids[0] + list(answer.token_ids)])
        theirs = model(sequence).logits[0, 5:-1].argmax(-1).tolist()
        assert list(answer.token_ids) == theirs


class TestText:
    def test_text_prompts_get_bos_once(self, llm):
        request = llm.generate("the cat", max_tokens=4)[0]
        assert request.prompt_token_ids[0] == 1
        assert 1 not in request.prompt_token_ids[1:]
        assert request.outputs[0].text == llm.tokenizer.decode(request.outputs[0].token_ids)

    def test_special_tokens_in_a_prompt_are_plain_text(self, llm):
        assert llm.encode("<s>the</s>").count(1) == 1
        assert 2 not in llm.encode("<s>the</s>")

    def test_an_empty_prompt_starts_from_bos(self, llm):
        assert llm.generate("", max_tokens=3)[0].prompt_token_ids == (1,)

    def test_streamed_texts_join_to_the_text(self, llm):
        params = {"max_tokens": 30, "temperature": 1.5, "seed": 3}
        texts = ["the cat", "naïve 🙂", ""]
        answers = generate(llm, texts, **params)
        joined = ["", "", ""]
        tokens = [[], [], []]
        for event in llm.stream(texts, **params):
            joined[event.request] += event.text
            tokens[event.request] += event.token_ids
        assert joined == [a.text for a in answers]
        assert tokens == [list(a.token_ids) for a in answers]

    def test_timings(self, llm):
        stream = llm.stream(["the cat", "sat"], max_tokens=5, ignore_eos=True)
        list(stream)
        t = stream.timings
        assert t.new_tokens == 10
        assert t.prompt_tokens == sum(map(len, stream.prompt_token_ids))
        assert 0 < t.first_token_s <= t.total_s


class TestSampling:
    def test_a_seed_gives_the_same_text_on_every_mesh_and_in_every_batch(self, folder, llm):
        params = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, seed=11, max_tokens=16)
        expected = generate(llm, "the cat", params)[0].token_ids
        assert generate(llm, ["mat", "on the mat", "the cat", "sat"], params)[2].token_ids == expected
        for mesh_shape in ((8, 1), (1, 8)):
            other = load(folder, mesh=make_mesh(*mesh_shape))
            assert generate(other, "the cat", params)[0].token_ids == expected

    def test_without_a_seed_texts_differ(self, llm):
        answers = generate(llm, ["the cat"] * 4, temperature=2.0, max_tokens=16)
        assert len({a.token_ids for a in answers}) == 4

    def test_a_greedy_row_beside_sampled_ones(self, llm):
        greedy = generate(llm, "the cat", max_tokens=12)[0].token_ids
        params = [SamplingParams(temperature=t, max_tokens=12, seed=1) for t in (1.0, 0.0, 2.0)]
        assert generate(llm, ["the cat"] * 3, params)[1].token_ids == greedy

    def test_generation_config_gives_the_defaults(self, folder, tmp_path):
        llm = load(folder, mesh=make_mesh())
        assert llm.sampling_defaults == {"temperature": 0.0}
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        (copy / "generation_config.json").write_text(
            '{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.2}'
        )
        sampled = load(copy, mesh=make_mesh())
        expected = {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.2}
        assert sampled.sampling_defaults == expected


def joined(stream):
    """What the events of a stream make, as {(request, index): (text, token_ids, finish_reason, stop_reason)}."""
    found = {}
    for event in stream:
        text, token_ids, *_ = found.get((event.request, event.index), ("", ()))
        ended = (event.finish_reason, event.stop_reason)
        found[event.request, event.index] = (text + event.text, token_ids + event.token_ids, *ended)
    return found


def plain(outputs):
    """The same of whole answers."""
    return {
        (i, a.index): (a.text, a.token_ids, a.finish_reason, a.stop_reason)
        for i, request in enumerate(outputs)
        for a in request.outputs
    }


LONG = {"max_tokens": 40, "ignore_eos": True, "temperature": 1.0, "seed": 5}


class TestStop:
    def test_a_stop_string_ends_the_answer_and_its_tokens(self, llm):
        free = generate(llm, "the cat", **LONG)[0]
        stop = free.text[12:15]
        at = free.text.index(stop)
        made = llm.engine.stats().seconds.new_tokens
        stopped = generate(llm, "the cat", stop=stop, **LONG)[0]
        made = llm.engine.stats().seconds.new_tokens - made
        n = len(stopped.token_ids)
        assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (free.text[:at], "stop", stop)
        assert stopped.token_ids == free.token_ids[:n]
        assert stop in llm.tokenizer.decode(stopped.token_ids)
        assert stop not in llm.tokenizer.decode(stopped.token_ids[:-1])
        assert n <= made <= n + 2 < 40, "the engine goes on for the steps under way alone"
        assert not llm.engine.has_unfinished or llm.engine.step() == []
        assert llm.engine.stats().scheduler.pages_used == 0
        including = generate(llm, "the cat", stop=stop, include_stop_str_in_output=True, **LONG)[0]
        assert including.text == free.text[: at + len(stop)]
        later = generate(llm, "the cat", stop=stop, min_tokens=n, **LONG)[0]
        assert len(later.token_ids) > n

    def test_streams_are_the_same_and_other_answers_go_on(self, llm):
        texts = ["the cat", "on the mat", ""]
        free = llm.generate(texts, n=2, **LONG)
        stop = [free[0].outputs[1].text[5:8], free[2].outputs[0].text[20:22]]
        stopped = llm.generate(texts, n=2, stop=stop, **LONG)
        stream = llm.stream(texts, n=2, stop=stop, **LONG)
        assert joined(stream) == plain(stopped)
        assert [[o.outputs, o.prompt_token_ids] for o in stream.outputs()] == [
            [o.outputs, o.prompt_token_ids] for o in stopped
        ]
        for with_stop, without in zip(stopped, free, strict=True):
            for ours, theirs in zip(with_stop.outputs, without.outputs, strict=True):
                cuts = [theirs.text.index(s) for s in stop if s in theirs.text]
                assert ours.finish_reason == ("stop" if cuts else "length")
                assert theirs.text.startswith(ours.text)
                assert len(ours.text) == min(cuts, default=len(theirs.text))
        assert stopped[0].outputs[1].stop_reason == stop[0]
        assert {o.finish_reason for r in stopped for o in r.outputs} == {"stop", "length"}

    def test_streams_in_turns(self, llm):
        """What waits in the mailbox of a stream for an answer that has ended is dropped."""
        free = generate(llm, "the cat", **LONG)[0]
        stop = free.text[4:7]
        expected = plain(llm.generate(["the cat"], stop=stop, **LONG))
        first, second = llm.stream("the cat", stop=stop, **LONG), llm.stream("sat", **LONG)
        event = next(iter(first))
        assert len(list(second)) == 40
        found = joined([event, *first])
        assert found == expected

    def test_stop_token_ids(self, llm):
        free = generate(llm, "the cat", **LONG)[0]
        token = free.token_ids[7]
        n = free.token_ids.index(token) + 1
        stopped = generate(llm, "the cat", stop_token_ids=[token], **LONG)[0]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)
        assert stopped.token_ids == free.token_ids[:n]
        assert stopped.text == llm.tokenizer.decode(free.token_ids[: n - 1])

    def test_special_tokens_in_the_text(self, llm):
        """Of the tokens 0 to 2 alone the text is empty, or all of them written out."""
        params = {"allowed_token_ids": [0, 1], "max_tokens": 6, "ignore_eos": True, "temperature": 1.0, "seed": 0}
        assert generate(llm, "the cat", **params)[0].text == ""
        answer = generate(llm, "the cat", skip_special_tokens=False, **params)[0]
        assert answer.text == "".join({0: "<unk>", 1: "<s>"}[i] for i in answer.token_ids)
        stream = llm.stream("the cat", skip_special_tokens=False, **params)
        assert joined(stream)[0, 0][0] == answer.text


class TestBestOf:
    def test_the_most_likely_of_the_same_answers(self, llm):
        params = {"max_tokens": 8, "temperature": 1.5, "seed": 4}
        every = llm.generate("the cat", n=6, logprobs=0, **params)[0].outputs
        ranked = sorted(every, key=lambda a: a.cumulative_logprob, reverse=True)
        assert len({a.token_ids for a in every}) > 2
        best = llm.generate("the cat", n=2, best_of=6, **params)[0].outputs
        assert [(a.index, a.token_ids, a.logprobs) for a in best] == [
            (i, a.token_ids, None) for i, a in enumerate(ranked[:2])
        ]
        scored = llm.generate("the cat", best_of=6, logprobs=0, **params)[0].outputs
        assert [a.cumulative_logprob for a in scored] == pytest.approx([ranked[0].cumulative_logprob], abs=1e-5)

    def test_cannot_be_streamed(self, llm):
        with pytest.raises(RequestError, match="best_of=2 with n=1 cannot be streamed"):
            llm.stream("the cat", best_of=2)
        assert not llm.engine.has_unfinished


def test_logprobs_of_the_prompt(llm):
    ids = prompts(300)[2]
    (request,) = llm.generate([ids], prompt_logprobs=2, max_tokens=2)
    exact = np.asarray(jax.nn.log_softmax(llm.forward([ids])[0]), np.float64)
    first, *others = request.prompt_logprobs
    assert first is None
    assert len(others) == len(ids) - 1
    for position, of_token in enumerate(others):
        row, token = exact[position], ids[position + 1]
        assert next(iter(of_token)) == token
        assert set(of_token) == {token, *np.argsort(-row)[:2].tolist()}
        for i, found in of_token.items():
            assert found.logprob == pytest.approx(row[i], abs=1e-4)
            assert found.rank == 1 + (row > row[i]).sum()
            assert found.decoded_token == llm.tokenizer.decode([i], skip_special=False)
    assert llm.generate([ids], max_tokens=2)[0].prompt_logprobs is None


class TestForward:
    def test_logits(self, llm):
        tokens = np.random.default_rng(0).integers(0, 300, (3, 9))
        ours = llm.forward(tokens)
        assert ours.shape == (3, 9, 300)
        assert distance(ours, logits(make_model("grouped", vocab_size=300), tokens, "float32")) < 1e-5

    @pytest.mark.parametrize("tokens", [[1, 2], [[]], [[300]], [[-1]]])
    def test_refuses(self, llm, tokens):
        with pytest.raises(RequestError):
            llm.forward(tokens)


def loaded_of(llm, **changes):
    model = LoadedModel(llm.config, llm.mesh, llm.weights, llm.tokenizer, llm.sampling_defaults)
    return dataclasses.replace(model, **changes)


class TestSpeculation:
    """Answers stay what they are; that the guesses are checked rightly is tested with the engine."""

    PARAMS = {"temperature": 0.8, "seed": 4, "max_tokens": 12, "ignore_eos": True}  # noqa: RUF012

    def test_a_draft_model_from_a_folder(self, folder, llm):
        drafted = load(folder, mesh=make_mesh(1, 1), draft_model=folder, num_speculative_tokens=3)
        texts = ["the cat", "mat"]
        expected, answers = generate(llm, texts, **self.PARAMS), generate(drafted, texts, **self.PARAMS)
        assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
        assert {a.speculation for a in expected} == {None}
        counts = drafted.engine.stats().scheduler
        assert counts.accepted_tokens == counts.drafted_tokens == sum(a.speculation.drafted for a in answers)
        assert all(a.speculation.accepted == a.speculation.drafted >= 6 for a in answers), "it is the same model"
        events = list(drafted.stream(texts, **self.PARAMS))
        told = {e.request: e.speculation for e in events if e.finish_reason}
        assert told == {i: a.speculation for i, a in enumerate(answers)}
        assert {e.speculation for e in events if e.finish_reason is None} == {None}

    def test_another_size_keeps_it(self, llm, monkeypatch):
        drafted = LLM(loaded_of(llm), draft_model=loaded_of(llm), **SMALL, num_speculative_tokens=3)
        again, more = drafted.resized(**SMALL), drafted.resized(**SMALL, num_speculative_tokens=5)
        assert (again.options.num_speculative_tokens, more.options.num_speculative_tokens) == (3, 5)
        without = drafted.resized(**SMALL, draft_model=None)
        assert without.options.num_speculative_tokens is None
        monkeypatch.setattr(llm_module, "Engine", lambda *_, draft, **__: draft)
        for made in (drafted, again, more):
            config, weights = made.engine
            assert config == llm.config
            assert weights is llm.weights
        assert without.engine is None

    def test_prompt_lookup(self, llm):
        looking = llm.resized(**SMALL, num_speculative_tokens=4, prompt_lookup_min=1)
        ids = [1, *[5, 6, 7, 8] * 4]
        found, expected = generate(looking, [ids], max_tokens=20), generate(llm, [ids], max_tokens=20)
        assert found[0].token_ids == expected[0].token_ids
        assert found[0].speculation.drafted >= found[0].speculation.accepted
        assert looking.engine.stats().scheduler.drafted_tokens == found[0].speculation.drafted > 0

    @pytest.mark.parametrize(
        ("changes", "options", "error", "message"),
        [
            ({}, {}, ConfigError, "a draft model needs num_speculative_tokens"),
            ({"mesh": (2, 2)}, {"num_speculative_tokens": 2}, MeshError, "the draft model: it is on .*same mesh"),
            ({"vocab_size": 299}, {"num_speculative_tokens": 2}, ConfigError, "it has 299 tokens, the model 300"),
            ({"max_seq_len": 9}, {"num_speculative_tokens": 2}, ConfigError, "give max_model_len=9 or less"),
            ({"tokens": "other"}, {"num_speculative_tokens": 2}, ConfigError, "gives a text other ids"),
        ],
        ids=["count", "mesh", "vocabulary", "context", "tokenizer"],
    )
    def test_a_draft_that_does_not_fit(self, llm, folder, tmp_path, changes, options, error, message):
        changes = dict(changes)
        given = {"mesh": make_mesh(*changes.pop("mesh"))} if "mesh" in changes else {}
        if changes.pop("tokens", None):
            tokenizer = json.loads((folder / "tokenizer.json").read_text())
            tokenizer["model"]["merges"].pop()
            (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
            given["tokenizer"] = loading.load_tokenizer(tmp_path)
            assert given["tokenizer"].vocab_size == llm.tokenizer.vocab_size
        draft = loaded_of(llm, config=llm.config.replace(**changes), **given)
        with pytest.raises(error, match=message):
            LLM(loaded_of(llm), draft_model=draft, **SMALL, **options)

    def test_mistakes_show_before_weights_are_read(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(loading, "load_weights", None)
        with pytest.raises(CheckpointError, match=r"the draft model: .*nowhere"):
            load(folder, draft_model=tmp_path / "nowhere", num_speculative_tokens=2)
        other = shutil.copytree(folder, tmp_path / "other")
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["pre_tokenizer"] = None
        (other / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(ConfigError, match="the draft model: its tokenizer gives a text other ids"):
            load(folder, draft_model=other, num_speculative_tokens=2)
        with pytest.raises(ConfigError, match="a draft model needs num_speculative_tokens"):
            load(folder, draft_model=folder)


NAN = "the model's logits for the next token are not numbers"


class TestErrors:
    @pytest.fixture
    def spoilt(self, llm, monkeypatch):
        """A token after which no logits are numbers, and which nobody says by himself."""
        said = {t for a in generate(llm, ["the cat", "mat"], max_tokens=9) for t in a.token_ids}
        token = next(t for t in range(3, 300) if t not in said | {*llm.encode("the cat"), *llm.encode("mat")})
        weights = llm.engine.runner.weights
        table = np.array(weights.tok_embeddings)
        table[token] = np.nan
        table = jax.device_put(table, weights.tok_embeddings.sharding)
        monkeypatch.setattr(llm.engine.runner, "weights", weights._replace(tok_embeddings=table))
        return token

    def test_an_error_of_one_answer_leaves_the_others_whole(self, llm, spoilt, caplog):
        greedy = SamplingParams(temperature=0, max_tokens=9)
        later = dataclasses.replace(greedy, logit_bias={spoilt: 100.0}, ignore_eos=True, logprobs=0)
        batch = ["the cat", [1, spoilt], "the cat", "mat"]
        with caplog.at_level("WARNING"):
            outputs = llm.generate(batch, [greedy, dataclasses.replace(greedy, n=2), later, greedy])
        alone = [generate(llm, batch[i], greedy)[0] for i in (0, 3)]
        assert [outputs[i].outputs[0] for i in (0, 3)] == alone
        assert {a.error for a in alone} == {None}
        assert [(o.finish_reason, o.error, o.token_ids) for o in outputs[1].outputs] == [("error", NAN, ())] * 2
        (last,) = outputs[2].outputs
        assert (last.finish_reason, last.error, last.token_ids) == ("error", NAN, (spoilt,))
        assert (last.text, len(last.logprobs)) == (llm.tokenizer.decode([spoilt]), 1)
        told = [f"prompt {i}, answer {j}: {NAN}" for i, j in ((1, 0), (1, 1), (2, 0))]
        assert sorted(r.getMessage() for r in caplog.records if NAN in r.getMessage()) == told
        events = [e for e in llm.stream([batch[1], "mat"], greedy) if e.finish_reason]
        assert sorted((e.request, e.error) for e in events if e.error) == [(0, NAN)]
        assert len(events) == 2
        assert not llm.engine.is_dead

    def test_a_dead_engine_raises(self, llm, monkeypatch):
        dying = llm.resized(**SMALL)

        def fail(*_):
            raise RuntimeError("the device is on fire")

        started = dying.stream(["the cat", "mat"], **LONG)
        next(iter(started))
        monkeypatch.setattr(dying.engine.runner, "execute", fail)
        with pytest.raises(EngineError, match="a step failed with RuntimeError: the device is on fire"):
            dying.generate("sat", max_tokens=3)
        with pytest.raises(EngineError, match="on fire"):
            list(started)
        with pytest.raises(EngineError, match="the engine is dead: a step failed"):
            dying.generate("sat", max_tokens=3)

    def answers(self, *deltas, **params):
        """Outputs of the answers that these deltas make."""
        made = Answers((1,), SamplingParams(**params), None, streamed=False)
        for delta in deltas:
            made.add(delta)
        return made.outputs()

    def test_what_an_error_cut_short_is_not_the_best_answer(self):
        """It has fewer tokens, and so the higher likelihood."""
        whole = TokenDelta("r", 0, (5, 6), (TokenLogprob(-3.0, 1, ()),) * 2, "length")
        cut = TokenDelta("r", 1, (), (), "error", NAN)
        assert [a.token_ids for a in self.answers(whole, cut, best_of=2)] == [(5, 6)]
        turned = whole._replace(index=1), cut._replace(index=0)
        assert [a.token_ids for a in self.answers(*turned, best_of=2)] == [(5, 6)]

    def test_other_processes_get_errors_and_guesses(self):
        plain = {"token_ids": (5,), "logprobs": None, "request_id": "r"}
        deltas = [
            TokenDelta(**plain, index=0, finish_reason="length", speculation=Speculation(5, 2)),
            TokenDelta(**plain, index=1, finish_reason="error", error=NAN),
        ]
        outputs = self.answers(*deltas, n=2)
        request = RequestOutput("0", "the", (1,), outputs)
        read = from_plain(json.loads(json.dumps(to_plain(request))), "0", "the", [1])
        assert read == request
        assert isinstance(read.outputs[0].speculation, Speculation)
        assert [o.error for o in read.outputs] == [None, NAN]


class TestMistakes:
    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ([[5, 300]], "token id 300 is outside the vocabulary of 300"),
            ([[5, -1]], "token id -1"),
            ([[]], "has no tokens"),
            ([], "there is no prompt"),
            ([[5] * 64], "64 tokens.*shorten it to 63"),
        ],
    )
    def test_prompt(self, llm, prompt, message):
        with pytest.raises(RequestError, match=message):
            generate(llm, prompt)

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"temperature": -0.1}, "temperature=-0.1"),
            ({"top_p": 0}, "top_p=0"),
            ({"max_tokens": 0}, "max_tokens=0"),
            ({"heat": 1}, "unknown sampling parameter 'heat'"),
        ],
    )
    def test_parameters(self, llm, params, message):
        with pytest.raises(RequestError, match=message):
            generate(llm, "the", **params)

    def test_one_set_of_parameters_or_one_each(self, llm):
        with pytest.raises(RequestError, match="2 sampling parameters for 3 prompts"):
            generate(llm, ["a"] * 3, [SamplingParams(seed=0)] * 2)
        with pytest.raises(RequestError, match="not both"):
            generate(llm, "a", SamplingParams(), temperature=1.0)

    def test_an_empty_prompt_without_bos(self, llm):
        tokenizer = dataclasses.make_dataclass("NoBos", ["bos_id", "adds_bos"])(None, False)
        without = LLM(LoadedModel(llm.config.replace(bos_id=None), llm.mesh, llm.weights, tokenizer))
        with pytest.raises(RequestError, match="no BOS token"):
            generate(without, "")

    def test_text_without_a_tokenizer(self, llm):
        without = LLM(LoadedModel(llm.config, llm.mesh, llm.weights), **SMALL)
        with pytest.raises(RequestError, match="without a tokenizer"):
            generate(without, "the")
        for call in (without.generate, without.stream):
            with pytest.raises(RequestError, match="stop strings need a tokenizer"):
                call([[1, 2]], stop="x")
        assert not without.engine.has_unfinished

    def test_mesh_that_does_not_fit_the_heads(self, folder):
        with pytest.raises(MeshError, match="Sizes that work"):
            load(folder, mesh=make_mesh(1, 3))

    def test_no_tokenizer(self, tmp_path):
        save(make_model("grouped"), tmp_path)
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            load(tmp_path)

    def test_missing_folder(self, tmp_path):
        with pytest.raises((ConfigError, sharded_llama.ShardedLlamaError), match="nowhere"):
            load(tmp_path / "nowhere")


def test_random_model_needs_no_checkpoint(llm):
    random = LLM.random(llm.config, make_mesh(2, 2), **SMALL)
    assert len(generate(random, [[1, 2, 3]], max_tokens=4, ignore_eos=True)[0].token_ids) == 4
    assert jax.tree.leaves(random.weights)[0].sharding.mesh.shape == {"data": 2, "model": 2}
