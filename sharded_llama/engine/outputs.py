"""What callers get: answers in the shape of vLLM's, whole or as they come."""

import dataclasses
from collections.abc import Iterable, Sequence

from ..tokenizer import StreamDecoder, Tokenizer
from .engine import TokenDelta, TokenLogprob

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Logprob:
    """Log-probability of a token, among the raw logits."""

    logprob: float
    rank: int  # 1: the most likely
    decoded_token: str | None  # None without a tokenizer


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One answer to a prompt."""

    index: int  # which of the n answers
    text: str  # without the prompt; empty when the model has no tokenizer
    token_ids: tuple[int, ...]  # an end-of-sequence token included
    finish_reason: str  # "stop": an end-of-sequence token; "length": max_tokens or the end of the context; "abort"
    logprobs: tuple[dict[int, Logprob], ...] | None = None  # by token id, the sampled one first, if asked for

    @property
    def cumulative_logprob(self) -> float | None:
        """Log-probability of the whole answer."""
        if self.logprobs is None:
            return None
        return sum(next(iter(of_token.values())).logprob for of_token in self.logprobs)


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """The answers to one prompt."""

    request_id: str
    prompt: Prompt | None  # None: a conversation
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]


@dataclasses.dataclass(frozen=True)
class StreamEvent:
    """What one step added to one answer. Texts of an answer join up to its `CompletionOutput.text`."""

    request: int  # index into the prompts
    index: int  # which of the n answers
    text: str  # may be empty while a character is incomplete
    token_ids: tuple[int, ...]
    finish_reason: str | None  # set on the answer's last event
    logprobs: tuple[dict[int, Logprob], ...] | None = None


class Answer:
    """Collects the deltas of one answer; text is decoded as far as it is asked for."""

    def __init__(self, index: int, tokenizer: Tokenizer | None):
        self.index, self._tokenizer = index, tokenizer
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self._reason: str | None = None
        self._has_logprobs = False

    def add(self, delta: TokenDelta) -> None:
        self._token_ids += delta.token_ids
        self._reason = delta.finish_reason
        if delta.logprobs is not None:
            self._has_logprobs = True
            self._logprobs += self._named(delta)

    def event(self, request: int, delta: TokenDelta) -> StreamEvent:
        """The delta with its text. Called for every delta of the answer or for none."""
        text = ""
        if self._decoder is not None:
            text = self._decoder.push(delta.token_ids) + (self._decoder.flush() if delta.finish_reason else "")
        logprobs = None if delta.logprobs is None else tuple(self._named(delta))
        return StreamEvent(request, self.index, text, delta.token_ids, delta.finish_reason, logprobs)

    def output(self) -> CompletionOutput:
        text = self._tokenizer.decode(self._token_ids) if self._tokenizer else ""
        logprobs = tuple(self._logprobs) if self._has_logprobs else None
        return CompletionOutput(self.index, text, tuple(self._token_ids), self._reason or "", logprobs)

    def _named(self, delta: TokenDelta) -> Iterable[dict[int, Logprob]]:
        for token, found in zip(delta.token_ids, delta.logprobs or (), strict=True):
            yield self._of_token(token, found)

    def _of_token(self, token: int, found: TokenLogprob) -> dict[int, Logprob]:
        by_token = {token: Logprob(found.logprob, found.rank, self._text(token))}
        for rank, (other, logprob) in enumerate(found.top, 1):
            by_token.setdefault(other, Logprob(logprob, rank, self._text(other)))
        return by_token

    def _text(self, token: int) -> str | None:
        return self._tokenizer.decode([token], skip_special=False) if self._tokenizer else None
