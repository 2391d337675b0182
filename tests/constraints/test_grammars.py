"""Regexes, choices, grammars; which tokens a mask has; what is refused or stops within the limits; other tokenizers."""

import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from random_walks import random_answer, tokens_of
from tokenizers import Tokenizer as LibraryTokenizer, decoders, models, normalizers

from sharded_llama.constraints import GrammarCompiler, bits, grammar as grammar_module, trial
from sharded_llama.errors import ConstraintError, RequestError
from sharded_llama.sampling.structured import StructuredOutputs
from sharded_llama.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parents[2] / "../shared/data/tokenizers/llama3"
real = pytest.mark.skipif(not DATA.is_dir(), reason="needs Llama 3's tokenizer.model in ../shared/data/tokenizers")

EOS = 1


def answers(compiler: GrammarCompiler, tokenizer: Tokenizer, form: StructuredOutputs, n: int, free: int = 12) -> list:
    grammar = compiler.compile(form)
    drawn = [random_answer(grammar, tokenizer, 1024, EOS, random.Random(i), free) for i in range(n)]
    return [answer for answer in drawn if answer is not None]


def mask_of(compiler: GrammarCompiler, form: StructuredOutputs, *tokens: int) -> list[int]:
    matcher = compiler.compile(form).start()
    for token in tokens:
        matcher.accept(token)
    words_W = np.full(32, 0xFFFFFFFF, np.uint32)
    matcher.mask(words_W)
    return tokens_of(words_W)


@pytest.mark.parametrize(
    "regex",
    [
        "a+b?",
        r"(yes|no)(, (sir|madam))?\.",
        r"\d{3}-\d{2,4}",
        r"[A-Z][a-z]{1,6}( [A-Z][a-z]{1,6}){0,2}",
        r"\w{1,8}@\w{1,8}\.(com|org)",
        r"-?(0|[1-9]\d{0,4})(\.\d{1,3})?",
        r"(?i:title): [^\n]{3,10}",
        r"[^a-z\s]{2,6}",
        r"\W\D\S[^\W_]{2}[\w.-]{1,3}[^\d\s]",
        r'\{"k":\[[0-9]{1,2}(,[0-9]{1,2}){0,3}\]\}',
        r"(?s:.{4,9})",
        r"[你好é€😀]{1,4}",
        r"a\/b\\c\n\t/x",
        r"^start[\]\[^-]{1,3}$",
        r"(?P<year>\d{4})|(?:x|y)*z",
    ],
)
def test_every_answer_matches_the_whole_regex(regex: str, compiler: GrammarCompiler, tokenizer: Tokenizer):
    drawn = answers(compiler, tokenizer, StructuredOutputs(regex=regex), 25)
    assert len(drawn) >= 20
    for answer in drawn:
        assert re.fullmatch(regex, answer, re.ASCII), answer


def test_choices_are_exact(compiler: GrammarCompiler, tokenizer: Tokenizer):
    choice = [
        "yes",
        "no",
        "yes, but",
        'a "quoted" one\\',
        "line\nbreak",
        "größer 你好 😀",
        "<|end_of_text|>",
        " \x00\x7f",
    ]
    drawn = answers(compiler, tokenizer, StructuredOutputs(choice=choice), 120)
    assert len(drawn) == 120
    assert set(drawn) == set(choice)


LARK = """
start: sum
sum: product ("+" product)*
product: atom ("*" atom)*
atom: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,3}/
"""
GBNF = """
root  ::= item ("+" item)*   # a sum
item  ::= num | "(" root ")"
num   ::= [0-9] [0-9]?
"""


@pytest.mark.parametrize("text", [LARK, GBNF], ids=["lark", "gbnf"])
def test_grammars(text: str, compiler: GrammarCompiler, tokenizer: Tokenizer):
    drawn = answers(compiler, tokenizer, StructuredOutputs(grammar=text), 40)
    assert len(drawn) >= 30
    assert any("(" in answer for answer in drawn)
    for answer in drawn:
        assert re.fullmatch(r"[0-9+*()]+", answer)
        while "(" in answer:  # innermost parentheses become a number, until none is left
            reduced = re.sub(r"\([0-9]{1,3}([+*][0-9]{1,3})*\)", "1", answer)
            assert reduced != answer
            answer = reduced
        assert re.fullmatch(r"[0-9]{1,3}([+*][0-9]{1,3})*", answer)


def test_a_schema_in_a_grammar_is_as_strict_as_alone(compiler: GrammarCompiler, tokenizer: Tokenizer):
    text = 'start: "call " %json {"type": "array", "items": {"type": "integer"}, "maxItems": 2} "!"'
    for answer in answers(compiler, tokenizer, StructuredOutputs(grammar=text), 20):
        assert re.fullmatch(r"call \[\s*(-?\d+\s*(,\s*-?\d+\s*)?)?\]!", answer)
    for schema in ('{"uniqueItems": true}', '{"x-guidance": {"lenient": true}, "not": {}}', "3", "[1", ""):
        with pytest.raises(RequestError, match="structured_outputs"):
            compiler.compile(StructuredOutputs(grammar=f"start: %json {schema}"))


def test_the_mask_of_each_step(compiler: GrammarCompiler, tokenizer: Tokenizer):
    """Against the definition: a token may come if what it spells can still become a match."""
    form = StructuredOutputs(regex="a?b?[cd]?(ab)?")
    matches = {a + b + c + d for a in ("", "a") for b in ("", "b") for c in ("", "c", "d") for d in ("", "ab")}
    prefixes = {match[:n] for match in matches for n in range(1, len(match) + 1)}
    spelled = {t: tokenizer.decode([t]) for t in range(2, 1024)}
    first_token = {text: t for t, text in reversed(spelled.items())}.__getitem__
    for so_far in sorted(matches):
        expected = {t for t, text in spelled.items() if so_far + text in prefixes} | {EOS}
        assert set(mask_of(compiler, form, *map(first_token, so_far))) == expected


def test_special_tokens_only_end(compiler: GrammarCompiler, tokenizer: Tokenizer):
    free = StructuredOutputs(regex="(?s:.*)")
    assert mask_of(compiler, free)[0] == EOS
    assert 0 not in mask_of(compiler, free)
    some = StructuredOutputs(regex="(?s:.+)")
    assert not {0, EOS} & set(mask_of(compiler, some))
    assert EOS in mask_of(compiler, some, 50)
    # Any token, by number: special ones are still left out.
    assert not {0, EOS} & set(mask_of(compiler, StructuredOutputs(grammar='start: <[*]> "a"')))
    # Text that reads like a special token is text.
    spelled = StructuredOutputs(choice=["<|end_of_text|>"])
    assert mask_of(compiler, spelled) == tokenizer.encode("<|end_of_text|>")[:1]
    for named in ("<|end_of_text|>", "<[1]>", "<|begin_of_text|>"):
        with pytest.raises(RequestError, match=r"structured_outputs\.grammar cannot be used"):
            compiler.compile(StructuredOutputs(grammar=f'start: "a" {named}'))


def test_the_end(compiler: GrammarCompiler, tokenizer: Tokenizer):
    matcher = compiler.compile(StructuredOutputs(regex="a!?")).start()
    assert (matcher.may_end, matcher.finished) == (False, False)
    matcher.accept(*tokenizer.encode("a"))
    assert (matcher.may_end, matcher.finished) == (True, False)
    matcher.accept(*tokenizer.encode("!"))
    assert (matcher.may_end, matcher.finished) == (True, True)
    words_W = np.zeros(32, np.uint32)
    for _ in range(2):
        matcher.mask(words_W)
        assert tokens_of(words_W) == [EOS]
        matcher.accept(EOS)
        assert (matcher.may_end, matcher.finished) == (True, True)
    with pytest.raises(ConstraintError, match="token 50 is not permitted"):
        matcher.accept(50)
    with pytest.raises(ConstraintError, match="token 1 is not permitted"):
        compiler.compile(StructuredOutputs(regex="a!?")).start().accept(EOS)


@pytest.mark.parametrize("token", [0, 17, 1023, 1024, 5000, -1])
def test_a_token_that_is_not_permitted(token: int, compiler: GrammarCompiler):
    matcher = compiler.compile(StructuredOutputs(choice=["!!"])).start()
    with pytest.raises(ConstraintError, match=r"not permitted|cannot go on"):
        matcher.accept(token)


@pytest.mark.parametrize("vocab_size", [1000, 1024, 1025, 1100])
def test_models_with_more_or_fewer_tokens(vocab_size: int, tokenizer: Tokenizer):
    compiler = GrammarCompiler(tokenizer, vocab_size, (EOS, 7, vocab_size + 5))
    matcher = compiler.compile(StructuredOutputs(regex="(?s:.+)")).start()
    words_W = np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)
    matcher.mask(words_W)
    permitted = set(tokens_of(words_W))
    assert max(permitted) < min(vocab_size, 1024)
    # Bytes that begin a character are permitted, those that never do are not.
    assert len(permitted) > 700
    assert not {0, 1, 7} & permitted
    matcher.accept(50)
    matcher.mask(words_W)
    assert {1, 7} <= set(tokens_of(words_W))
    assert max(tokens_of(words_W)) < min(vocab_size, 1024)


def test_without_end_of_sequence_tokens(tokenizer: Tokenizer):
    matcher = GrammarCompiler(tokenizer, 1024, ()).compile(StructuredOutputs(regex="a")).start()
    words_W = np.zeros(32, np.uint32)
    matcher.mask(words_W)
    assert tokens_of(words_W) == tokenizer.encode("a")
    matcher.accept(*tokenizer.encode("a"))
    assert matcher.finished
    matcher.mask(words_W)
    assert not words_W.any()


def chained(n: int, link: str) -> dict:
    """Definitions of which each refers to the next, in a way that `link` says."""
    refs = [{"$ref": f"#/$defs/d{i + 1}"} for i in range(n)]
    defs = {f"d{i}": {link: [ref, ref]} if link else ref for i, ref in enumerate(refs)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{n}": {"type": "integer"}}}


HOSTILE = {
    "counts": (dict(regex="(a{1000}){1000}"), "refused"),
    "counts in counts": (dict(regex="((a{100}){100}){100}"), "refused"),
    "counts of choices": (dict(regex="(((a|b){1,1000}){1,1000}){1,1000}"), "bounded"),
    "counts of anything": (dict(regex="(.{1,300}){1,300}"), "bounded"),
    "optional ones": (dict(regex="(a?){500}a{500}"), "refused"),
    "many states": (dict(regex=".*a.{60}"), "works"),
    "backtracking": (dict(regex="(x+x+)+y"), "works"),
    "long count": (dict(regex="a{0,1000000}"), "works"),
    "deep groups": (dict(regex="(" * 2000 + "a" + ")" * 2000), "refused"),
    "many stars": (dict(regex="(a*)*" * 1500), "stops"),
    "nothing matches": (dict(regex=r"[^\s\S]"), "refused"),
    "unclosed": (dict(regex="(a"), "refused"),
    "out of the regex": (dict(regex='x/ | "y" | /z'), "works"),
    "itself": (dict(grammar="start: start"), "refused"),
    "each other": (dict(grammar="start: a\na: b\nb: a"), "refused"),
    "no end": (dict(grammar='start: "a" start'), "refused"),
    "ambiguous": (dict(grammar='start: start start start | "a" | ""'), "works"),
    "doubling rules": (
        dict(grammar="start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(2000)) + 'r2000: "x"'),
        "refused",
    ),
    "doubling terminals": (
        dict(grammar="start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(40)) + 'A40: "x"'),
        "refused",
    ),
    "complement": (dict(grammar=r"start: A" + "\n" + r"A: /(.|\n)*/ & ~/(.|\n)*a.{15}b(.|\n)*/"), "bounded"),
    "no grammar": (dict(grammar="?"), "refused"),
    "deep GBNF": (dict(grammar="root ::= " + "(" * 3000 + '"a"' + ")" * 3000), "refused"),
    "long GBNF": (dict(grammar="root ::= " + '"a" ' * 10_000), "refused"),
    "many GBNF rules": (dict(grammar="root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(300))), "refused"),
    "blank lines": (dict(grammar="\n" * 60_000 + "x ::="), "refused"),
    "large enum": (dict(json={"enum": [f"value number {i * 7919}" for i in range(9000)]}), "works"),
    "chain of references": (dict(json=chained(2000, "")), "works"),
    "doubling references": (dict(json=chained(40, "allOf")), "works"),
    "endless reference": (dict(json={"$ref": "#"}), "refused"),
    "endless reference with siblings": (
        dict(json={"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"maxLength": 3}]}}}),
        "refused",
    ),
    "endless object": (
        dict(json={"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
        "never ends",
    ),
    "product of alternatives": (
        dict(json={"allOf": [{"anyOf": [{"required": [f"{i} {j}"]} for j in range(6)]} for i in range(9)]}),
        "refused",
    ),
    "pattern with counts": (dict(json={"type": "string", "pattern": "^(a{1000}){1000}$"}), "refused"),
    "remote reference": (dict(json={"$ref": "https://example.com/schema"}), "refused"),
    "many properties": (dict(json={"properties": {f"p{i}": {"minimum": i} for i in range(1000)}}), "works"),
    "many choices": (dict(choice=[f"choice number {i}" for i in range(3000)]), "works"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_forms_are_refused_or_stay_within_the_limits(
    name: str, compiler: GrammarCompiler, tokenizer: Tokenizer
):
    given, expected = HOSTILE[name]
    form = StructuredOutputs(**given)
    if expected == "refused":
        with pytest.raises(RequestError, match="structured_outputs") as caught:
            compiler.compile(form)
        assert len(str(caught.value)) < 800
        return
    grammar = compiler.compile(form)
    outcomes = set()
    for i in range(10):
        try:
            answer = random_answer(grammar, tokenizer, 1024, EOS, random.Random(i))
            outcomes.add("works" if answer is not None else "never ends")
        except ConstraintError:
            outcomes.add("stops")
    assert outcomes <= {"works", "stops"} if expected == "bounded" else expected in outcomes


def test_answers_do_not_use_up_one_anothers_limits(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Each answer needs some of the lexer's states, all of them together more than there may be."""
    form = StructuredOutputs(regex="(?s:.*a.{60})")
    monkeypatch.setitem(grammar_module.LIMITS, "max_lexer_states", 2000)
    grammar = GrammarCompiler(tokenizer, 1024, (EOS,)).compile(form)
    renewed = []
    monkeypatch.setattr(
        type(grammar), "renew", lambda self, worn, renew=grammar.renew: renewed.append(1) or renew(worn)
    )
    ids = tokenizer.encode("a") + tokenizer.encode("b")
    for i in range(60):
        rng, matcher, words_W = random.Random(i), grammar.start(), np.zeros(32, np.uint32)
        for _ in range(30):
            token = rng.choice(ids)
            matcher.mask(words_W)
            assert bits.has(words_W, token)
            matcher.accept(token)
    assert 3 <= len(renewed) < 40


def test_an_answer_that_hits_a_limit_by_itself(tokenizer: Tokenizer, compiler: GrammarCompiler):
    grammar = compiler.compile(StructuredOutputs(regex="(a*)*" * 1500))
    for _ in range(2):
        with pytest.raises(ConstraintError, match=r"^the grammar cannot go on: lexer error: .* constructed$"):
            random_answer(grammar, tokenizer, 1024, EOS, random.Random(0))


def test_the_cache_is_bounded(tokenizer: Tokenizer):
    compiler = GrammarCompiler(tokenizer, 1024, (EOS,))
    forms = [StructuredOutputs(regex=f"a{{{i + 1}}}") for i in range(grammar_module.MAX_CACHED + 1)]
    first, second = compiler.compile(forms[0]), compiler.compile(forms[1])
    for form in forms[2:-1]:
        compiler.compile(form)
    assert compiler.compile(StructuredOutputs(regex="a{1}")) is first  # used again, so the second goes
    compiler.compile(forms[-1])
    assert compiler.compile(forms[0]) is first
    assert compiler.compile(forms[1]) is not second


def test_without_the_library(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'sharded-llama\[structured\]'"):
        GrammarCompiler(tokenizer, 1024, (EOS,)).compile(StructuredOutputs(regex="a"))


@pytest.mark.parametrize(
    "regex",
    ["(?=a)b", r"(a)\1", r"\<a", "[[a]b]", "[a--b]", "[a&&b]", "a{,3}", "a++", r"\h", "(?x)a b", "(?m)a", "[]a]"],
)
def test_regexes_that_mean_different_things_elsewhere(regex: str, compiler: GrammarCompiler):
    with pytest.raises(RequestError, match=r"structured_outputs\.regex: .* all engines share"):
        compiler.compile(StructuredOutputs(regex=regex))


def test_bits():
    rng = np.random.default_rng(0)
    for vocab_size in (1, 31, 32, 33, 1000):
        ids = sorted({int(i) for i in rng.integers(0, vocab_size, 20)})
        words_W = bits.of_ids([*ids, vocab_size, vocab_size + 40], vocab_size)
        assert words_W.dtype == np.uint32
        assert len(words_W) == bits.n_words(vocab_size) == -(-vocab_size // 32)
        assert [t for t in range(vocab_size) if words_W[t // 32] >> (t % 32) & 1] == ids == tokens_of(words_W)
        assert [t for t in range(-1, vocab_size + 70) if bits.has(words_W, t)] == ids
        assert bits.lowest(words_W) == ids[0]
        bits.clear(words_W, ids[0])
        assert tokens_of(words_W) == ids[1:]
        assert tokens_of(bits.all_of(vocab_size)) == list(range(vocab_size))
    assert bits.lowest(np.zeros(3, np.uint32)) is None


def space_stripping_tokenizer(folder: Path) -> Tokenizer:
    """Like Llama 2's tokenizer.json: a space put before the text, characters and bytes, the first space stripped."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcyesno,", "▁a", "▁y", "ye", "▁b", "bc"]
    merges = [("▁", "a"), ("▁", "y"), ("y", "e"), ("▁", "b"), ("b", "c")]
    vocab = {name: i for i, name in enumerate(names)}
    made = LibraryTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def test_a_tokenizer_that_drops_the_first_space(tmp_path: Path):
    tokenizer = space_stripping_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a bc")) == "a bc"
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, (2,))
    choice = ["yes, a bc", "no", "é😀 a"]
    grammar = compiler.compile(StructuredOutputs(choice=choice))
    drawn = {random_answer(grammar, tokenizer, tokenizer.vocab_size, 2, random.Random(i)) for i in range(40)}
    assert drawn == set(choice)
    # The first space would be lost, so nothing may begin with one.
    assert set(
        random_answer(
            compiler.compile(StructuredOutputs(regex=" ?a")), tokenizer, tokenizer.vocab_size, 2, random.Random(i)
        )
        for i in range(20)
    ) == {"a"}
    with pytest.raises(RequestError, match="no token of text"):
        compiler.compile(StructuredOutputs(regex=" a"))


@real
def test_llama3():
    tokenizer = load_tokenizer(DATA)
    compiler = GrammarCompiler(tokenizer, 128256, (128001, 128009))
    choice = ["Straße 你好", "yes, of course", "  indented"]
    grammar = compiler.compile(StructuredOutputs(choice=choice))
    drawn = {random_answer(grammar, tokenizer, 128256, 128009, random.Random(i)) for i in range(30)}
    assert drawn == set(choice)
    words_W = np.zeros(128256 // 32, np.uint32)
    matcher = compiler.compile(StructuredOutputs(regex="(?s:.*)")).start()
    matcher.mask(words_W)
    permitted = tokens_of(words_W)
    assert permitted[-2:] == [128001, 128009]
    assert all(tokenizer.decode([t]) for t in permitted[:-2])
    assert len(permitted) > 127_000


@pytest.mark.parametrize(
    "hostile",
    [
        {"json": {"type": "string", "allOf": [{"pattern": f".*a{i}.{{20}}"} for i in range(24)]}},
        {"grammar": "start: A\nA: " + " & ".join(f"/.*a{i}.*/" for i in range(40))},
    ],
    ids=["allOf", "lark"],
)
def test_what_takes_exponential_time_is_stopped(hostile: dict, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """And the next one is compiled."""
    monkeypatch.setattr(trial, "SECONDS", 1.0)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, (EOS,))
    with pytest.raises(RequestError, match="cannot be compiled in 1 s"):
        compiler.compile(StructuredOutputs(**hostile))
    monkeypatch.undo()
    assert compiler.compile(StructuredOutputs(regex="[0-9]{3}")).first_W.any()
