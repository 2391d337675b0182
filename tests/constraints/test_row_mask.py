"""The mask of one sequence: allowed tokens, bad words, a least length and a grammar, alone and together."""

import random
from typing import Any

import numpy as np
import pytest
from random_walks import tokens_of

from sharded_llama.constraints import Grammar, GrammarCompiler, RowMask, row_mask
from sharded_llama.errors import ConstraintError, RequestError
from sharded_llama.sampling.params import SamplingParams
from sharded_llama.sampling.structured import StructuredOutputs
from sharded_llama.tokenizer import Tokenizer

V, EOS = 1024, 1
EVERY = set(range(V))


def make(
    tokenizer: Tokenizer | None = None,
    grammar: Grammar | None = None,
    stop: frozenset[int] = frozenset({EOS}),
    **given: Any,
) -> RowMask | None:
    params = SamplingParams(max_tokens=100, **given)
    return row_mask(params, vocab_size=V, stop_ids=stop, tokenizer=tokenizer, grammar=grammar)


def permitted(mask: RowMask, generated: list[int]) -> set[int]:
    words_W = mask.mask(generated)
    assert words_W.shape == (V // 32,)
    assert words_W.dtype == np.uint32
    return set(tokens_of(words_W))


def test_nothing_is_masked():
    assert make() is None
    assert make(min_tokens=5, stop=frozenset()) is None
    assert make(min_tokens=5, stop=frozenset({V + 3})) is None


def test_allowed_tokens():
    mask = make(allowed_token_ids=[5, 1023, 5])
    assert not mask.is_dynamic
    assert mask.switch_at == 0
    assert permitted(mask, []) == permitted(mask, [5, 5]) == {5, 1023}
    with pytest.raises(RequestError, match="allowed_token_ids has 1024, but the model has 1024 tokens"):
        make(allowed_token_ids=[3, 1024])


def test_bits_beyond_the_vocabulary_are_clear():
    params = SamplingParams(min_tokens=1)
    mask = row_mask(params, vocab_size=1001, stop_ids=frozenset({EOS}), tokenizer=None, grammar=None)
    assert tokens_of(mask.mask([7])) == list(range(1001))
    assert mask.mask([]).shape == (32,)


def test_min_tokens():
    mask = make(min_tokens=3, stop=frozenset({EOS, 40, 50_000}))
    assert not mask.is_dynamic
    assert mask.switch_at == 3
    for n in range(3):
        assert permitted(mask, [9] * n) == EVERY - {EOS, 40}
    for n in (3, 4):
        assert permitted(mask, [9] * n) == EVERY


def test_min_tokens_and_allowed_tokens():
    mask = make(min_tokens=2, allowed_token_ids=[EOS, 9])
    assert [permitted(mask, [9] * n) for n in range(4)] == [{9}, {9}, {EOS, 9}, {EOS, 9}]
    unchanged = make(min_tokens=2, allowed_token_ids=[8, 9])
    assert unchanged.switch_at == 0
    with pytest.raises(RequestError, match="allowed_token_ids without any"):
        make(min_tokens=2, allowed_token_ids=[EOS])
    assert permitted(make(allowed_token_ids=[EOS]), []) == {EOS}


def test_words_of_one_token_are_banned_in_both_forms(tokenizer: Tokenizer):
    the, spaced = tokenizer.encode("the"), tokenizer.encode(" the")
    assert len(the) == len(spaced) == 1
    mask = make(tokenizer, bad_words=["the"])
    assert not mask.is_dynamic
    assert permitted(mask, []) == EVERY - {the[0], spaced[0]}
    assert permitted(make(tokenizer, bad_words=[" the"]), []) == EVERY - {the[0], spaced[0]}


def test_the_last_token_of_a_word_is_banned_after_the_others(tokenizer: Tokenizer):
    word = "xylophone"
    forms = [tokenizer.encode(word), tokenizer.encode(" " + word)]
    assert all(len(form) > 2 for form in forms)
    mask = make(tokenizer, bad_words=[word])
    assert mask.is_dynamic
    assert mask.switch_at == 0
    for *before, last in forms:
        assert permitted(mask, []) == EVERY
        assert permitted(mask, before[1:]) == EVERY - ({last} if before[1:] in [f[:-1] for f in forms] else set())
        assert last not in permitted(mask, before)
        assert last not in permitted(mask, [3, 4, *before])
        assert last in permitted(mask, [*before, 3])


def test_bad_words_never_come_in_random_answers(tokenizer: Tokenizer):
    """Of few tokens, so that they would come at once."""
    words = ["ab", "ba b", "aaa", "c"]
    ids = sorted({t for text in ("a", "b", " a", " b", "c", " ", "ab") for t in tokenizer.encode(text)})
    mask = make(tokenizer, bad_words=words, allowed_token_ids=ids)
    sequences = [tokenizer.encode(space + word) for word in words for space in ("", " ")]
    rng, generated, unmasked = random.Random(0), [], []
    for _ in range(400):
        generated.append(rng.choice(sorted(permitted(mask, generated))))
        unmasked.append(rng.choice(ids))

    def count(tokens: list[int]) -> int:
        return sum(tokens[i : i + len(s)] == s for s in sequences for i in range(len(tokens)))

    assert count(generated) == 0
    assert count(unmasked) > 20


def test_bad_words_that_leave_nothing(tokenizer: Tokenizer):
    (the,) = tokenizer.encode("the")
    with pytest.raises(RequestError, match="allowed_token_ids without any"):
        make(tokenizer, bad_words=["the"], allowed_token_ids=[the])
    one, other = tokenizer.encode("qq")
    assert one == other
    mask = make(tokenizer, bad_words=["qq"], allowed_token_ids=[one])
    assert permitted(mask, []) == {one}
    with pytest.raises(ConstraintError, match="no token is left"):
        mask.mask([one])
    with pytest.raises(RequestError, match="bad_words need a tokenizer"):
        make(bad_words=["a"])
    with pytest.raises(RequestError, match="surrogate"):
        make(tokenizer, bad_words=["\ud800"])


def test_a_grammar_sees_each_token_once(compiler: GrammarCompiler, tokenizer: Tokenizer):
    grammar = compiler.compile(StructuredOutputs(regex="a[bc]d"))
    mask, other = make(grammar=grammar), make(grammar=grammar)
    assert mask.is_dynamic
    a, b, c, d = (tokenizer.encode(x)[0] for x in "abcd")
    assert permitted(mask, []) == permitted(mask, []) >= {a}
    assert permitted(mask, [a]) >= {b, c}
    assert permitted(mask, [a]) == permitted(mask, [a])
    assert permitted(mask, [a, c, d]) == {EOS}  # two at once
    assert mask.finished
    assert not other.finished
    assert a in permitted(other, [])
    assert permitted(mask, [a, c, d, EOS]) == {EOS}
    with pytest.raises(ValueError, match="has seen 4"):
        mask.mask([a])
    with pytest.raises(ConstraintError, match=r"not permitted|cannot go on"):
        other.mask([d])


def test_a_grammar_within_allowed_tokens(compiler: GrammarCompiler, tokenizer: Tokenizer):
    a, b, c = (tokenizer.encode(x)[0] for x in "abc")
    grammar = compiler.compile(StructuredOutputs(regex="[ab]{2}c?"))
    mask = make(grammar=grammar, allowed_token_ids=[a, c])
    assert permitted(mask, []) == {a}
    assert permitted(mask, [a, a]) == {c}  # could end, and could go on: EOS is not among the allowed
    assert permitted(mask, [a, a, c]) == {EOS}  # nothing but the end is left
    with pytest.raises(RequestError, match="allowed tokens without any that the grammar permits"):
        make(grammar=grammar, allowed_token_ids=[c])
    with pytest.raises(RequestError, match="allowed tokens without any that the grammar permits"):
        make(tokenizer, grammar, bad_words=["a", "b"], allowed_token_ids=[a, b, c])
    stuck = make(grammar=compiler.compile(StructuredOutputs(regex="[aq][bc]")), allowed_token_ids=[a])
    assert permitted(stuck, []) == {a}
    with pytest.raises(ConstraintError, match="no token is left"):
        stuck.mask([a])


def test_bad_words_within_a_grammar(compiler: GrammarCompiler, tokenizer: Tokenizer):
    grammar = compiler.compile(StructuredOutputs(regex="[qz]{3}"))
    q, z = tokenizer.encode("q")[0], tokenizer.encode("z")[0]
    mask = make(tokenizer, grammar, bad_words=["qz"])
    assert permitted(mask, []) == {q, z}
    assert permitted(mask, [q]) == {q}
    assert permitted(mask, [q, q]) == {q}
    assert permitted(mask, [q, q, q]) == {EOS}


def test_min_tokens_and_a_grammar(compiler: GrammarCompiler, tokenizer: Tokenizer):
    a = tokenizer.encode("a")[0]
    free = make(grammar=compiler.compile(StructuredOutputs(regex="a*")), min_tokens=3, allowed_token_ids=[a, EOS])
    assert [permitted(free, [a] * n) for n in range(5)] == [{a}, {a}, {a}, {a, EOS}, {a, EOS}]
    short = make(grammar=compiler.compile(StructuredOutputs(regex="a")), min_tokens=3)
    assert permitted(short, []) == {a}
    assert permitted(short, [a]) == {EOS}  # the grammar wins


def test_ignore_eos_and_a_grammar(compiler: GrammarCompiler, tokenizer: Tokenizer):
    mask = make(grammar=compiler.compile(StructuredOutputs(choice=["a"])), ignore_eos=True, stop=frozenset())
    assert permitted(mask, tokenizer.encode("a")) == {EOS}


def test_a_stop_token_is_banned_early_although_the_grammar_permits_it(compiler: GrammarCompiler, tokenizer: Tokenizer):
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    grammar = compiler.compile(StructuredOutputs(regex="[ab]{4}"))
    mask = make(grammar=grammar, min_tokens=2, stop=frozenset({EOS, b}), allowed_token_ids=[a, b])
    assert [permitted(mask, [a] * n) for n in range(5)] == [{a}, {a}, {a, b}, {a, b}, {EOS}]
