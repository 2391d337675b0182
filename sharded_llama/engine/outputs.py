"""What callers get: answers in the shape of vLLM's, whole or as they come."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..errors import RequestError
from ..sampling import SamplingParams
from ..sampling.entropy import TokenMetrics
from ..tokenizer import StreamDecoder, Tokenizer
from .deltas import Speculation, TokenDelta, TokenLogprob
from .stop_strings import StopMatcher, StopStrings

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Logprob:
    """Log-probability of a token, among the raw logits."""

    logprob: float
    rank: int  # 1: the most likely
    decoded_token: str | None  # None without a tokenizer


Logprobs = dict[int, Logprob]  # at one position, by token id: the token that stands there first, then the most likely


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One answer to a prompt."""

    index: int  # which of the n answers; of best_of, 0 is the most likely
    text: str  # without the prompt and what ended it; empty when the model has no tokenizer
    token_ids: tuple[int, ...]  # the token that ended it included
    finish_reason: str  # "stop"; "length": max_tokens or the end of the context; "abort"; "error"
    logprobs: tuple[Logprobs, ...] | None = None  # of each token, if asked for
    stop_reason: str | int | None = None  # the stop string or the one of stop_token_ids; None: end of sequence, length
    metrics: tuple[TokenMetrics, ...] | None = None  # of each token, of the entropy sampler
    speculation: Speculation | None = None  # of its tokens; None: none, or a stop string ended it
    error: str | None = None  # why it could not go on, where finish_reason is "error"

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
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None  # of each token of the prompt, None for the first


@dataclasses.dataclass(frozen=True)
class StreamEvent:
    """What one step added to one answer. Texts of an answer join up to its `CompletionOutput.text`."""

    request: int  # index into the prompts
    index: int  # which of the n answers
    text: str  # may be empty while a character is incomplete, or could begin a stop string
    token_ids: tuple[int, ...]
    finish_reason: str | None  # set on the answer's last event
    logprobs: tuple[Logprobs, ...] | None = None
    stop_reason: str | int | None = None
    metrics: tuple[TokenMetrics, ...] | None = None
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None  # on the first event of answer 0, if asked for
    speculation: Speculation | None = None  # on the last event, as the next
    error: str | None = None


class Answers:
    """The answers to one request, made of the engine's deltas.

    Stop strings are looked for here: they end an answer of which the engine has not ended the tokens.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        eos_ids: Sequence[int] = (),
        *,
        streamed: bool,
        request: int = 0,
    ):
        """`token_ids` are the prompt's. `streamed` gives every event its text, else it is made at the end.

        Raises RequestError for stop strings without a tokenizer, and for a stream of the best of more answers.
        """
        if params.stop and tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and there is none: use stop_token_ids.")
        if streamed and params.n_sequences > params.n:
            raise RequestError(
                f"best_of={params.best_of} with n={params.n} cannot be streamed: which answers are the best is known "
                "only at their end. Leave best_of out, or do not stream."
            )
        self.params, self._token_ids = params, token_ids
        self.prompt_logprobs: tuple[Logprobs | None, ...] | None = None
        self._names = _Names(tokenizer)
        stop = StopStrings(params.stop) if params.stop else None
        self._answers = [
            _Answer(request, index, params, tokenizer, frozenset(eos_ids), stop, streamed, self._names)
            for index in range(params.n_sequences)
        ]
        self.n_unfinished = len(self._answers)

    @property
    def engine_params(self) -> SamplingParams:
        """What to ask the engine for: log-probabilities too where the best answers are chosen by them."""
        if self._chooses and self.params.logprobs is None:
            return dataclasses.replace(self.params, logprobs=0)
        return self.params

    def add(self, delta: TokenDelta) -> StreamEvent | None:
        """What a delta adds; None when its answer has ended before.

        If the event has a finish_reason and the delta has none, the engine is to be told by `Engine.end`.
        """
        answer = self._answers[delta.index]
        if answer.finish_reason is not None:
            return None
        event = answer.add(delta)
        self.n_unfinished -= answer.finish_reason is not None
        if delta.prompt_logprobs is None:
            return event
        pairs = zip(self._token_ids, delta.prompt_logprobs, strict=True)
        self.prompt_logprobs = tuple(found and self._names.logprobs(token, found) for token, found in pairs)
        return dataclasses.replace(event, prompt_logprobs=self.prompt_logprobs)

    def outputs(self) -> tuple[CompletionOutput, ...]:
        """The n answers, as far as they are. Of more than n the most likely ones, the most likely first."""
        outputs = [answer.output() for answer in self._answers]
        if self._chooses:
            best = sorted(outputs, key=_likelihood, reverse=True)[: self.params.n]
            changes = {"logprobs": None} if self.params.logprobs is None else {}
            outputs = [dataclasses.replace(output, index=index, **changes) for index, output in enumerate(best)]
        return tuple(outputs)

    @property
    def _chooses(self) -> bool:
        return self.params.n_sequences > self.params.n


def _likelihood(output: CompletionOutput) -> float:
    """For comparing answers. One that an error cut short is never the better one."""
    likelihood = None if output.error else output.cumulative_logprob
    return -math.inf if likelihood is None else likelihood


class _Answer:
    """Collects what the deltas of one answer bring."""

    def __init__(
        self,
        request: int,
        index: int,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        eos_ids: frozenset[int],
        stop: StopStrings | None,
        streamed: bool,
        names: "_Names",
    ):
        self._request, self._index, self._params = request, index, params
        self._tokenizer, self._eos_ids, self._names = tokenizer, eos_ids, names
        self._decoder = self._matcher = None
        if tokenizer is not None and (streamed or stop is not None):
            self._decoder = StreamDecoder(tokenizer, params.skip_special_tokens)
        if stop is not None:
            self._matcher = StopMatcher(stop, params.include_stop_str_in_output)
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._n_hidden = 0  # tokens at the end that are not in the text
        self._logprobs: list[Logprobs] | None = None
        self._metrics: list[TokenMetrics] | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._speculation: Speculation | None = None
        self._error: str | None = None

    def add(self, delta: TokenDelta) -> StreamEvent:
        self.finish_reason = delta.finish_reason
        self._speculation, self._error = delta.speculation, delta.error
        if delta.finish_reason == "stop" and delta.token_ids:
            self._stop_by_token(delta.token_ids[-1])
        text, n_tokens = self._read(delta.token_ids)
        if self.finish_reason != "error":  # a stop string came before it
            self._error = None
        token_ids, logprobs, metrics = delta.token_ids[:n_tokens], None, None
        if text:
            self._texts.append(text)
        self._token_ids += token_ids
        if delta.logprobs is not None:
            logprobs = tuple(map(self._names.logprobs, token_ids, delta.logprobs))
            self._logprobs = self._logprobs or []
            self._logprobs += logprobs
        if delta.metrics is not None:
            metrics = delta.metrics[:n_tokens]
            self._metrics = self._metrics or []
            self._metrics += metrics
        return StreamEvent(
            request=self._request,
            index=self._index,
            text=text,
            token_ids=token_ids,
            finish_reason=self.finish_reason,
            logprobs=logprobs,
            stop_reason=self.stop_reason,
            metrics=metrics,
            speculation=self._speculation,
            error=self._error,
        )

    def output(self) -> CompletionOutput:
        text = "".join(self._texts)
        if self._decoder is None and self._tokenizer is not None:
            shown = self._token_ids[: len(self._token_ids) - self._n_hidden]
            text = self._tokenizer.decode(shown, skip_special=self._params.skip_special_tokens)
        return CompletionOutput(
            index=self._index,
            text=text,
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason or "",
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            stop_reason=self.stop_reason,
            metrics=None if self._metrics is None else tuple(self._metrics),
            speculation=self._speculation,
            error=self._error,
        )

    def _stop_by_token(self, token: int) -> None:
        """An answer ends with this token, which its text has only if that was asked for."""
        is_eos = token in self._eos_ids
        if is_eos or token in self._params.stop_token_ids:
            self._n_hidden = 0 if self._params.include_stop_str_in_output else 1
        if token in self._params.stop_token_ids and (self._params.ignore_eos or not is_eos):
            self.stop_reason = token

    def _read(self, token_ids: tuple[int, ...]) -> tuple[str, int]:
        """Text that these tokens make final, and how many of them there are up to the end of a stop string."""
        if self._decoder is None:
            return "", len(token_ids)
        shown = token_ids[: len(token_ids) - self._n_hidden]
        if self._matcher is None:
            return self._decoder.push(shown) + (self._decoder.flush() if self.finish_reason else ""), len(token_ids)
        text = ""
        for n, token in enumerate(shown, 1):
            text += self._match(self._decoder.push([token]), n)
            if self._matcher.found is not None:
                return text, n
        if self.finish_reason:
            text += self._match(self._decoder.flush(), len(shown)) + self._matcher.flush()
        return text, len(token_ids)

    def _match(self, text: str, n_new: int) -> str:
        """What of a text can be given out. A stop string in the text of the first min_tokens tokens does not count."""
        text = self._matcher.push(text, counts=len(self._token_ids) + n_new > self._params.min_tokens)
        if self._matcher.found is not None:
            self.finish_reason, self.stop_reason = "stop", self._matcher.found
        return text


class _Names:
    """Adds the texts of tokens to log-probabilities, each decoded once."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._texts: dict[int, str | None] = {}

    def logprobs(self, token: int, found: TokenLogprob) -> Logprobs:
        by_token = {token: Logprob(found.logprob, found.rank, self._text(token))}
        for rank, (other, logprob) in enumerate(found.top, 1):
            by_token.setdefault(other, Logprob(logprob, rank, self._text(other)))
        return by_token

    def _text(self, token: int) -> str | None:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token], skip_special=False) if self._tokenizer else None
        return self._texts[token]


def to_plain(output: RequestOutput) -> dict[str, Any]:
    """The answers as JSON can hold them, for the other processes, which know the prompt."""
    outputs = [vars(o) | {"logprobs": _map(_plain_logprobs, o.logprobs)} for o in output.outputs]
    return {"outputs": outputs, "prompt_logprobs": _map(_plain_logprobs, output.prompt_logprobs)}


def from_plain(
    plain: dict[str, Any], request_id: str, prompt: Prompt | None, token_ids: Sequence[int]
) -> RequestOutput:
    """The inverse of `to_plain`."""
    outputs = []
    for o in plain["outputs"]:
        logprobs, metrics = _map(_read_logprobs, o["logprobs"]), _map(lambda m: TokenMetrics(*m), o["metrics"])
        speculation = o["speculation"] and Speculation(*o["speculation"])
        read = {"logprobs": logprobs, "metrics": metrics, "speculation": speculation}
        outputs.append(CompletionOutput(**o | read | {"token_ids": tuple(o["token_ids"])}))
    prompt_logprobs = _map(_read_logprobs, plain["prompt_logprobs"])
    return RequestOutput(request_id, prompt, tuple(token_ids), tuple(outputs), prompt_logprobs)


def _map(function: Callable[[Any], Any], of_tokens: Iterable[Any] | None) -> tuple[Any, ...] | None:
    return None if of_tokens is None else tuple(map(function, of_tokens))


def _plain_logprobs(logprobs: Logprobs | None) -> list[list[Any]] | None:
    return logprobs and [[token, *dataclasses.astuple(p)] for token, p in logprobs.items()]


def _read_logprobs(plain: list[list[Any]] | None) -> Logprobs | None:
    return plain and {token: Logprob(*rest) for token, *rest in plain}
