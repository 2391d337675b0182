"""What one request asks of the sampler: names, defaults and meaning as in vLLM."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import RequestError
from .entropy_settings import EntropySettings
from .numbers import is_integer, is_number
from .structured import StructuredOutputs

MAX_N = 64  # answers to one prompt
MAX_LOGPROBS = 20  # most likely tokens whose probabilities a request can ask for
MAX_STOP, MAX_STOP_CHARS = 32, 1024  # stop strings of a request, characters of one
MAX_STOP_IDS = 256
MAX_BIAS, MAX_BIAS_VALUE = 300, 100.0  # tokens with a logit_bias of their own, and how large it may be
MAX_BAD_WORDS, MAX_BAD_CHARS = 128, 256
MAX_ID = 2**31 - 1
MAX_ITEMS = 2**20  # of any list: more than any vocabulary has


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen.

    Penalties, logit_bias and what is not allowed change the logits before anything is chosen, greedily too. Filters
    apply after the temperature in the order min_p, top_k, top_p, each to the renormalised result of the one before.
    Log-probabilities are always those of the raw logits.

    Raises RequestError on values out of bounds, and where settings contradict one another.
    """

    n: int = 1  # answers to one prompt, each with a seed of its own
    best_of: int | None = None  # make this many answers and keep the n most likely; None: n
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # keep this many of the most likely tokens; 0 or -1: all
    top_p: float = 1.0  # keep the smallest set of most likely tokens with at least this mass
    min_p: float = 0.0  # drop tokens less likely than this times the most likely one
    seed: int | None = None  # None: a fresh one for every request
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that were generated
    frequency_penalty: float = 0.0  # subtracted for every time that a token was generated
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of prompt's and generated tokens
    logit_bias: Mapping[int, float] | None = None  # added to the logits of these tokens
    allowed_token_ids: Iterable[int] | None = None  # no other token is chosen
    bad_words: Iterable[str] = ()  # never generated
    stop: str | Iterable[str] = ()  # texts that end the answer; they are not part of it
    include_stop_str_in_output: bool = False
    stop_token_ids: Iterable[int] = ()  # end the answer like end-of-sequence tokens, and ignore_eos keeps them
    ignore_eos: bool = False
    min_tokens: int = 0  # nothing ends the answer before it has this many
    max_tokens: int = 16  # new tokens at most
    logprobs: int | None = None  # log-probabilities of each token and of this many of the most likely ones
    prompt_logprobs: int | None = None  # the same for the prompt's tokens, each after those before it
    skip_special_tokens: bool = True  # the text leaves them out
    structured_outputs: StructuredOutputs | None = None  # a form that every answer has
    entropy: EntropySettings | None = None  # choose by entropy, in place of temperature, top_k, top_p and min_p

    def __post_init__(self) -> None:
        self._check("n", 1 <= self._integer("n") <= MAX_N, f"a whole number from 1 to {MAX_N}")
        self._check_optional("best_of", self.n, MAX_N)
        self._check("temperature", 0.0 <= self._number("temperature") <= 100.0, "a number from 0 (greedy) to 100")
        self._check("top_k", -1 <= self._integer("top_k") < 2**31, "a whole number: 0 or -1 (all tokens) or more")
        self._check("top_p", 0.0 < self._number("top_p") <= 1.0, "a number above 0 and at most 1")
        self._check("min_p", 0.0 <= self._number("min_p") <= 1.0, "a number from 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, -2.0 <= self._number(name) <= 2.0, "a number from -2 to 2")
        self._check("repetition_penalty", 0.01 <= self._number("repetition_penalty") <= 100.0, "from 0.01 to 100")
        self._check("max_tokens", 1 <= self._integer("max_tokens") < 2**31, "a whole number of at least 1")
        self._check("min_tokens", 0 <= self._integer("min_tokens") < 2**31, "a whole number of at least 0")
        self._check("min_tokens", self.min_tokens <= self.max_tokens, f"at most max_tokens={self.max_tokens}")
        self._check_optional("logprobs", 0, MAX_LOGPROBS)
        self._check_optional("prompt_logprobs", 0, MAX_LOGPROBS)
        if self.seed is not None:
            self._check("seed", -(2**63) <= self._integer("seed") < 2**64, "a whole number of at most 64 bits")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            self._check(name, isinstance(getattr(self, name), bool), "True or False")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        self._set("stop", self._texts("stop", stop, MAX_STOP, MAX_STOP_CHARS))
        self._set("bad_words", self._texts("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_BAD_CHARS))
        self._set("stop_token_ids", self._ids("stop_token_ids", self.stop_token_ids, MAX_STOP_IDS))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", self._ids("allowed_token_ids", self.allowed_token_ids, MAX_ITEMS))
            self._check("allowed_token_ids", bool(self.allowed_token_ids), "None or a list of at least one token id")
        self._check_bias()
        self._check_instance("structured_outputs", StructuredOutputs)
        self._check_instance("entropy", EntropySettings)

    @property
    def has_penalties(self) -> bool:
        """Whether what was said before changes the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def has_mask(self) -> bool:
        """Whether some tokens may not be chosen, here or at some place."""
        return bool(self.structured_outputs or self.allowed_token_ids or self.bad_words or self.min_tokens)

    @property
    def n_sequences(self) -> int:
        """Answers that are made, of which n are kept."""
        return self.best_of or self.n

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        right = f"a mapping of at most {MAX_BIAS} token ids to numbers from {-MAX_BIAS_VALUE:g} to {MAX_BIAS_VALUE:g}"
        self._check("logit_bias", isinstance(self.logit_bias, Mapping) and len(self.logit_bias) <= MAX_BIAS, right)
        for token, value in self.logit_bias.items():
            self._check("logit_bias", is_integer(token) and 0 <= token <= MAX_ID, right)
            self._check("logit_bias", is_number(value) and abs(value) <= MAX_BIAS_VALUE, right)
        self._set("logit_bias", {int(t): float(v) for t, v in self.logit_bias.items()} or None)

    def _texts(self, name: str, given: Any, most: int, longest: int) -> tuple[str, ...]:
        right = f"at most {most} texts, each of 1 to {longest} characters"
        values = self._listed(name, given, right)
        fits = all(isinstance(v, str) and 1 <= len(v) <= longest for v in values)
        self._check(name, fits and len(values) <= most, right)
        return values

    def _ids(self, name: str, given: Any, most: int) -> tuple[int, ...]:
        right = f"a list of at most {most} token ids"
        values = self._listed(name, given, right)
        self._check(name, len(values) <= most and all(is_integer(v) and 0 <= v <= MAX_ID for v in values), right)
        return tuple(dict.fromkeys(int(v) for v in values))

    def _listed(self, name: str, given: Any, right: str) -> tuple:
        if given is None:
            return ()
        self._check(name, isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping), right)
        values = tuple(itertools.islice(given, MAX_ITEMS + 1))
        self._check(name, len(values) <= MAX_ITEMS, right)
        return values

    def _check_optional(self, name: str, least: int, most: int) -> None:
        if getattr(self, name) is not None:
            right = f"None or a whole number from {least} to {most}"
            self._check(name, least <= self._integer(name) <= most, right)

    def _check_instance(self, name: str, of: type) -> None:
        value = getattr(self, name)
        self._check(name, value is None or isinstance(value, of), f"None or {of.__name__}(...)")

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        return float(value) if is_number(value) else math.nan

    def _integer(self, name: str) -> float:
        value = getattr(self, name)
        return value if is_integer(value) else math.nan

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check(self, name: str, ok: bool, right: str) -> None:
        if not ok:
            raise RequestError(f"{name}={_shortened(getattr(self, name))} must be {right}.")

    @classmethod
    def make(cls, defaults: dict[str, Any], **given: Any) -> "SamplingParams":
        """Parameters from a checkpoint's `defaults`, with what the user gave (not None) in their place."""
        unknown = set(given) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            names = ", ".join(f.name for f in dataclasses.fields(cls))
            raise RequestError(f"unknown sampling parameter {sorted(unknown)[0]!r}; there are: {names}.")
        return cls(**{**defaults, **{k: v for k, v in given.items() if v is not None}})


def _shortened(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = "a huge number"
    return text if len(text) <= 200 else text[:200] + "..."
