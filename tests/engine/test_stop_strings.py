"""Stop strings against a specification that looks at the whole text, and the answers that are cut by them."""

import itertools
import json
import math

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models

from sharded_llama.engine.deltas import TokenDelta, TokenLogprob
from sharded_llama.engine.loading import DEMO_CHECKPOINT
from sharded_llama.engine.outputs import Answers, Logprob, RequestOutput, from_plain, to_plain
from sharded_llama.engine.stop_strings import StopMatcher, StopStrings
from sharded_llama.errors import RequestError
from sharded_llama.sampling import SamplingParams
from sharded_llama.sampling.entropy import TokenMetrics
from sharded_llama.tokenizer import StreamDecoder, load_tokenizer

PROPERTY = settings(max_examples=300, deadline=None)
WORDS = st.text("ab", min_size=1, max_size=4)
EOS = 1  # of the demo tokenizer, whose other special token is 0


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_CHECKPOINT)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    """Byte tokens 3 to 258, letters with the space before them after that, as Llama 2 has them."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁the", "▁", "cat"]
    backend = Tokenizer(
        models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder = tmp_path_factory.mktemp("byte_fallback")
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


class TestMatcher:
    @PROPERTY
    @given(st.lists(WORDS, min_size=1, max_size=5), st.lists(st.tuples(st.text("ab", max_size=5), st.booleans())))
    def test_finds_the_first_that_counts_and_holds_back_no_more_than_could_become_one(self, strings, pieces):
        matcher, text, out, counted = StopMatcher(StopStrings(strings)), "", "", []
        for piece, counts in pieces:
            out += matcher.push(piece, counts)
            counted += range(len(text) + 1, len(text) + len(piece) + 1) if counts else []
            text += piece
            ends = [(end, s) for end in counted for s in strings if text[:end].endswith(s)]
            if not ends:
                assert matcher.found is None
                beginnings = {s[:i] for s in strings for i in range(len(s) + 1)}
                held = max(len(b) for b in beginnings if text.endswith(b))
                assert out == text[: len(text) - held]
                continue
            first = min(end for end, _ in ends)
            longest = max((s for end, s in ends if end == first), key=len)
            assert matcher.found == longest
            assert out == text[: first - len(longest)]
            assert matcher.push("ab") == matcher.flush() == ""
            return
        assert out + matcher.flush() == text

    @PROPERTY
    @given(st.lists(WORDS, min_size=1, max_size=5), st.lists(st.text("ab", max_size=5)))
    def test_with_the_stop_string(self, strings, pieces):
        without, including = (StopMatcher(StopStrings(strings), include) for include in (False, True))
        texts = ["".join(map(m.push, pieces)) + m.flush() for m in (without, including)]
        assert texts[1] == texts[0] + (without.found or "")
        assert including.found == without.found

    @pytest.mark.parametrize(
        ("strings", "text", "found", "before"),
        [
            (["b", "ab", "xab"], "xxab", "xab", "x"),  # all end at the same place: the longest
            (["abcd", "bc"], "abcd", "bc", "a"),  # the one that ends first, though the other began earlier
            (["\n\n"], "a\n\n\nb", "\n\n", "a"),
            (["🙂x"], "🙂🙂x", "🙂x", "🙂"),
            (["aab"], "aaaab", "aab", "aa"),
        ],
    )
    def test_examples(self, strings, text, found, before):
        for pieces in ([text], list(text)):
            matcher = StopMatcher(StopStrings(strings))
            assert "".join(map(matcher.push, pieces)) == before
            assert matcher.found == found

    def test_time_is_linear(self):
        """Text that almost matches all the time: what is looked up again is paid for by characters that came before."""
        strings = StopStrings(["a" * 1000 + "b", "a" * 500 + "c"])
        edges = Counting(strings._next)
        strings._next = edges
        matcher = StopMatcher(strings)
        text = ("a" * 999 + "d") * 20
        assert "".join(map(matcher.push, text)) == text
        assert edges.lookups <= 3 * len(text)
        assert len(strings.lengths) == 1 + 1001 + 1


class Counting(dict):
    lookups = 0

    def __contains__(self, key):
        self.lookups += 1
        return super().__contains__(key)


def deltas(ids, sizes=(1,), reason="length", index=0, **columns):
    """The deltas of one answer, whose sizes repeat; the last has the reason."""
    made, at = [], 0
    while at < len(ids):
        end = at + sizes[len(made) % len(sizes)]
        parts = {name: tuple(values[at:end]) for name, values in columns.items()}
        ended = reason if end >= len(ids) else None
        made.append(TokenDelta("r", index, tuple(ids[at:end]), parts.pop("logprobs", None), ended, **parts))
        at = end
    return made


def run(tokenizer, given, streamed=True, prompt=(0,), **params):
    """(events, outputs) of the deltas."""
    answers = Answers(prompt, SamplingParams(max_tokens=1000, **params), tokenizer, (EOS,), streamed=streamed)
    events = [event for delta in given if (event := answers.add(delta)) is not None]
    return events, answers.outputs()


def spec(tokenizer, ids, stop, min_tokens=0, include=False):
    """(text, number of tokens, stop string) of a text of one-byte characters, by what every token adds."""
    texts = [tokenizer.decode([i]) for i in ids]
    text = "".join(texts)
    for end in range(1, len(text) + 1):
        n_tokens = next(n for n in range(1, len(ids) + 1) if len("".join(texts[:n])) >= end)
        found = max((s for s in stop if text[:end].endswith(s)), key=len, default=None)
        if found and n_tokens > min_tokens:
            return text[: end if include else end - len(found)], n_tokens, found
    return text, len(ids), None


class TestAnswers:
    @PROPERTY
    @given(
        st.text("to be, rn\n", max_size=30),
        st.lists(st.text("to be, rn\n", min_size=1, max_size=6), min_size=1, max_size=3),
        st.lists(st.integers(1, 4), min_size=1, max_size=3),
        st.integers(0, 6),
        st.booleans(),
    )
    def test_equal_the_specification(self, tokenizer, text, stop, sizes, min_tokens, include):
        ids = tokenizer.encode(text)
        expected = spec(tokenizer, ids, stop, min_tokens, include)
        params = {"stop": stop, "min_tokens": min_tokens, "include_stop_str_in_output": include}
        for streamed in (False, True):
            events, (output,) = run(tokenizer, deltas(ids, sizes), streamed, **params)
            assert (output.text, len(output.token_ids), output.stop_reason) == expected
            assert list(output.token_ids) == ids[: expected[1]]
            assert output.finish_reason == ("" if not ids else "length" if expected[2] is None else "stop")
            assert "".join(e.text for e in events) == output.text
            assert [i for e in events for i in e.token_ids] == list(output.token_ids)
            assert [e.finish_reason for e in events[:-1]] == [None] * len(events[:-1])
            if events:
                assert (events[-1].finish_reason, events[-1].stop_reason) == (output.finish_reason, expected[2])

    def test_every_character_of_a_stop_string_in_a_token_of_its_own(self, tokenizer):
        stop = "\n你好🙂"
        ids = [tokenizer.encode(c) for c in "a" + stop + "b"]
        ids = [i for of_char in ids for i in of_char]
        assert len(ids) > len(stop) + 2, "characters of several tokens"
        events, (output,) = run(tokenizer, deltas(ids), stop=stop)
        assert (output.text, output.stop_reason) == ("a", stop)
        assert list(output.token_ids) == ids[:-1]
        assert [e.text for e in events] == ["a"] + [""] * (len(ids) - 2)

    def test_several_stop_strings_in_one_step(self, tokenizer):
        ids = tokenizer.encode("to be, or not to be\n")
        (event,), (output,) = run(tokenizer, deltas(ids, (100,), "length"), stop=["not", "or", "be\n"])
        assert (event.text, event.stop_reason) == ("to be, ", "or")
        assert output.token_ids == event.token_ids == tuple(ids[: len(event.token_ids)])
        assert tokenizer.decode(event.token_ids).endswith("or")

    def test_what_comes_after_a_stop_string_is_not_shown(self, tokenizer):
        ids = tokenizer.encode("one. two. three.")
        answers = Answers((0,), SamplingParams(stop="."), tokenizer, streamed=True)
        events = [answers.add(delta) for delta in deltas(ids, reason="length")]
        ended = [e for e in events if e is not None and e.finish_reason]
        assert len(ended) == 1
        assert events[-1] is None
        assert answers.n_unfinished == 0
        assert answers.outputs()[0].text == "one"

    def test_a_stop_string_beside_its_end_of_sequence(self, tokenizer):
        """A string that is complete when the answer ends by itself is still what stopped it."""
        ids = [*tokenizer.encode("so be it."), EOS]
        for sizes in ((1,), (100,)):
            _, (output,) = run(tokenizer, deltas(ids, sizes, "stop"), stop="it.")
            assert (output.text, output.stop_reason) == ("so be ", "it.")
            assert list(output.token_ids) == ids[:-1]

    def test_text_that_was_held_back_comes_at_the_end(self, tokenizer):
        ids = tokenizer.encode("to be")
        for reason in ("length", "stop", "abort"):
            given = deltas([*ids, EOS] if reason == "stop" else ids, reason=reason)
            events, (output,) = run(tokenizer, given, stop="be or")
            assert output.text == "".join(e.text for e in events) == "to be"
            assert (output.finish_reason, output.stop_reason) == (reason, None)

    def test_half_a_character_at_the_end(self, tokenizer):
        ids = tokenizer.encode("a🙂")[:-1]
        for params in ({"stop": "x"}, {}):
            assert run(tokenizer, deltas(ids), **params)[1][0].text == "a\ufffd"

    @pytest.mark.parametrize(
        ("params", "eos_ids", "expected"),
        [
            ({}, (7,), None),
            ({"stop_token_ids": [7]}, (EOS,), 7),
            ({"stop_token_ids": [7]}, (7,), None),
            ({"stop_token_ids": [7], "ignore_eos": True}, (7,), 7),
        ],
    )
    def test_stop_reason_of_tokens(self, tokenizer, params, eos_ids, expected):
        answers = Answers((0,), SamplingParams(**params), tokenizer, eos_ids, streamed=True)
        answers.add(TokenDelta("r", 0, (5, 7), None, "stop"))
        (output,) = answers.outputs()
        assert (output.stop_reason, output.token_ids) == (expected, (5, 7))

    @pytest.mark.parametrize("streamed", [False, True])
    @pytest.mark.parametrize("more", [{}, {"stop": "never"}])
    def test_the_token_that_stopped_and_special_tokens(self, tokenizer, streamed, more):
        """In the text are special tokens only if asked for, and what stopped it only if that was asked for as well."""
        ids = [*tokenizer.encode("or"), 0, EOS]
        special = [tokenizer.decode([i], skip_special=False) for i in (0, EOS)]
        assert all(special)
        for skip, include, expected in [
            (True, False, "or"),
            (True, True, "or"),
            (False, False, "or" + special[0]),
            (False, True, "or" + special[0] + special[1]),
        ]:
            params = {"skip_special_tokens": skip, "include_stop_str_in_output": include}
            events, (output,) = run(tokenizer, deltas(ids, reason="stop"), streamed, **params, **more)
            assert output.text == expected
            assert list(output.token_ids) == ids
            if streamed:
                assert "".join(e.text for e in events) == expected

    def test_a_stop_token_with_text_of_its_own(self, tokenizer):
        ids = tokenizer.encode("to be")
        params = {"stop_token_ids": [ids[-1]]}
        before = tokenizer.decode(ids[:-1])
        assert run(tokenizer, deltas(ids, reason="stop"), **params)[1][0].text == before
        assert run(tokenizer, deltas(ids, reason="stop"), False, **params)[1][0].text == before
        _, (output,) = run(tokenizer, deltas(ids, reason="stop"), include_stop_str_in_output=True, **params)
        assert output.text == "to be"

    def test_logprobs_and_metrics_end_with_the_tokens(self, tokenizer):
        ids = tokenizer.encode("a. b")
        found = [TokenLogprob(-float(i), 2, ((9, -0.25),)) for i in range(len(ids))]
        metrics = [TokenMetrics(*range(i, i + 12)) for i in range(len(ids))]
        given = deltas(ids, (2,), logprobs=found, metrics=metrics)
        events, (output,) = run(tokenizer, given, stop=".", logprobs=1)
        n = len(output.token_ids)
        assert 0 < n < len(ids)
        assert [list(of) for of in output.logprobs] == [[i, 9] for i in ids[:n]]
        assert output.logprobs[1] == {
            ids[1]: Logprob(-1.0, 2, tokenizer.decode([ids[1]])),
            9: Logprob(-0.25, 1, tokenizer.decode([9])),
        }
        assert output.cumulative_logprob == -sum(range(n))
        assert output.metrics == tuple(metrics[:n])
        assert sum((e.logprobs for e in events), ()) == output.logprobs
        assert sum((e.metrics for e in events), ()) == output.metrics

    def test_logprobs_of_the_prompt(self, tokenizer):
        found = (None, TokenLogprob(-1.5, 3, ((8, -0.5),)))
        delta = TokenDelta("r", 0, (5,), None, "length", prompt_logprobs=found)
        answers = Answers((4, 6), SamplingParams(prompt_logprobs=1), tokenizer, streamed=True)
        event = answers.add(delta)
        names = {i: tokenizer.decode([i], skip_special=False) for i in (6, 8)}
        expected = (None, {6: Logprob(-1.5, 3, names[6]), 8: Logprob(-0.5, 1, names[8])})
        assert answers.prompt_logprobs == event.prompt_logprobs == expected

    def test_answers_of_one_request_do_not_touch_one_another(self, tokenizer):
        ids = [tokenizer.encode("first. more"), tokenizer.encode("second")]
        in_turns = itertools.zip_longest(*(deltas(ids[i], index=i) for i in (0, 1)))
        _, outputs = run(tokenizer, [d for turn in in_turns for d in turn if d], n=2, stop=".")
        assert [(o.index, o.text, o.finish_reason) for o in outputs] == [(0, "first", "stop"), (1, "second", "length")]

    def test_without_a_tokenizer(self):
        _, (output,) = run(None, deltas([5, 6], logprobs=[TokenLogprob(-1.0, 1, ())] * 2))
        assert (output.text, output.token_ids) == ("", (5, 6))
        assert output.logprobs == ({5: Logprob(-1.0, 1, None)}, {6: Logprob(-1.0, 1, None)})
        with pytest.raises(RequestError, match=r"stop strings need a tokenizer.*stop_token_ids"):
            run(None, [], stop="x")

    def test_an_error_of_the_engine(self, tokenizer):
        _, (output,) = run(tokenizer, [TokenDelta("r", 0, (), None, "error", "the device is on fire")])
        assert (output.finish_reason, output.error) == ("error", "the device is on fire")


class TestBestOf:
    LOGPROBS = (-3.0, -1.0, -2.0, -1.0)

    def answered(self, tokenizer, **params):
        given = [
            TokenDelta("r", i, (40 + i, 41), (TokenLogprob(x, 1, ()), TokenLogprob(-0.5, 1, ())), "length")
            for i, x in enumerate(self.LOGPROBS)
        ]
        return run(tokenizer, given, streamed=False, **params)[1]

    @pytest.mark.parametrize("logprobs", [None, 0])
    def test_the_most_likely_answers_in_order(self, tokenizer, logprobs):
        outputs = self.answered(tokenizer, n=3, best_of=4, logprobs=logprobs)
        assert [o.index for o in outputs] == [0, 1, 2]
        assert [o.token_ids[0] for o in outputs] == [41, 43, 42]
        assert [o.cumulative_logprob for o in outputs] == ([None] * 3 if logprobs is None else [-1.5, -1.5, -2.5])

    def test_without_a_choice_they_stay_in_place(self, tokenizer):
        outputs = self.answered(tokenizer, n=4, best_of=4)
        assert [o.token_ids[0] for o in outputs] == [40, 41, 42, 43]

    def test_an_answer_without_a_token_is_the_last(self, tokenizer):
        answers = Answers((0,), SamplingParams(n=1, best_of=2), tokenizer, streamed=False)
        answers.add(TokenDelta("r", 0, (), None, "abort"))
        answers.add(TokenDelta("r", 1, (5,), (TokenLogprob(-90.0, 1, ()),), "length"))
        assert answers.outputs()[0].token_ids == (5,)

    def test_the_engine_is_asked_for_log_probabilities(self, tokenizer):
        def asked(**params):
            return Answers((0,), SamplingParams(**params), tokenizer, streamed=False).engine_params

        assert asked(best_of=2).logprobs == 0
        assert asked(best_of=2, logprobs=4).logprobs == 4
        assert asked(n=2, best_of=2).logprobs is None
        assert asked(best_of=2, stop="x", seed=3) == SamplingParams(best_of=2, stop="x", seed=3, logprobs=0)

    def test_cannot_be_streamed(self, tokenizer):
        with pytest.raises(RequestError, match="best_of=3 with n=2 cannot be streamed"):
            run(tokenizer, [], n=2, best_of=3)
        run(tokenizer, [], n=2, best_of=2)


def test_answers_travel_as_json(tokenizer):
    ids = tokenizer.encode("to be")
    found = [TokenLogprob(-1.5, 2, ((9, -0.25),))] * len(ids)
    metrics = [TokenMetrics(*range(12))] * len(ids)
    for columns in ({}, {"logprobs": found, "metrics": metrics}):
        _, outputs = run(tokenizer, deltas(ids, **columns), False)
        prompt_logprobs = (None, {3: Logprob(-math.pi, 1, "x")}) if columns else None
        output = RequestOutput("7", "p", (0, 3), outputs, prompt_logprobs)
        plain = json.loads(json.dumps(to_plain(output)))
        assert from_plain(plain, "7", "p", [0, 3]) == output
    assert isinstance(from_plain(plain, "7", "p", [0, 3]).outputs[0].metrics[0], TokenMetrics)


@PROPERTY
@given(data=st.data(), skip_special=st.booleans())
def test_streamed_special_tokens(data, skip_special, byte_fallback, tokenizer):
    """The pieces of text are the whole, with special tokens and without."""
    for each in (tokenizer, byte_fallback):
        last = each.vocab_size + 1
        ids = st.one_of(st.sampled_from([0, 1, 2, last - 2, last]), st.integers(0, last))
        chunks = data.draw(st.lists(st.lists(ids, max_size=4), max_size=8))
        decoder = StreamDecoder(each, skip_special)
        text = "".join(map(decoder.push, chunks)) + decoder.flush()
        assert text == each.decode([i for chunk in chunks for i in chunk], skip_special=skip_special)
