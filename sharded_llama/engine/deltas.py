"""What the engine says of a step, read from the arrays that the device gave."""

from typing import NamedTuple

import numpy as np

from ..sampling import Sampled
from ..sampling.entropy import TokenMetrics, token_metrics
from .packing import ScoredRows
from .scheduler import Plan
from .sequence import Sequence


class TokenLogprob(NamedTuple):
    """Log-probability of a token among the raw logits, its rank (1: the most likely), and the most likely tokens'."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]  # (token id, logprob), as many as were asked for


class Speculation(NamedTuple):
    """How good the guesses at an answer's tokens were."""

    drafted: int  # guesses that were checked
    accepted: int  # of these, right ones


class TokenDelta(NamedTuple):
    """What one step added to one answer."""

    request_id: str
    index: int  # which of the n answers
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None  # of these tokens, if the request asked for them
    finish_reason: str | None  # set on the last: "stop", "length", "abort" or "error"
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # on the first delta of answer 0, if asked for
    metrics: tuple[TokenMetrics, ...] | None = None  # of these tokens, if the entropy sampler chose them
    speculation: Speculation | None = None  # on the last delta, if the answer was speculated on


class Flight(NamedTuple):
    """Work that is queued on the device and not read yet."""

    plan: Plan
    columns: np.ndarray
    scored: list[ScoredRows]
    sampled: Sampled


def by_sequence(sampled: Sampled, flight: Flight) -> Sampled:
    """What was sampled as arrays (tokens, sequences of the plan, ..): of several steps, or of neighbouring rows."""
    if flight.plan.n_steps > 1:
        return Sampled(*(None if x is None else x[:, flight.columns] for x in sampled))
    at = np.minimum(flight.columns + np.arange(flight.plan.most_tokens)[:, None], len(sampled.tokens_R) - 1)
    return Sampled(*(None if x is None else x[at] for x in sampled))


def count_right(plan: Plan, tokens: np.ndarray) -> list[int]:
    """Of each sequence's drafts, how many are what was sampled in their places, up to the first that is not.

    Each token is drawn from the model's distribution after the drafts before it, with the noise that it would have
    without speculation; as long as the drafts are what was drawn, the tokens are those of plain decoding.
    """
    n_right, drafts_of = [0] * len(plan.rows), {}
    for decode, drafts in zip(plan.decode, plan.drafts, strict=True):
        drafts_of |= {id(seq): guesses for seq, guesses in zip(decode, drafts, strict=True) if guesses}
    for row, seq in enumerate(plan.rows):
        for i, guess in enumerate(drafts_of.get(id(seq), ())):
            if tokens[i, row] != guess:
                break
            n_right[row] += 1
    return n_right


def speculation_of(sequence: Sequence) -> Speculation | None:
    """None for a sequence that is not speculated on."""
    return Speculation(sequence.n_drafted, sequence.n_accepted) if sequence.speculates else None


def metrics_of(sampled: Sampled, row: int, n_tokens: int) -> tuple[TokenMetrics, ...]:
    """Of the first tokens of one row of `by_sequence`."""
    return tuple(token_metrics(sampled.metrics_RE[i, row]) for i in range(n_tokens))


def take_prompt_logprobs(sequence: Sequence) -> tuple[TokenLogprob | None, ...] | None:
    """The prompt's log-probabilities, once."""
    found, sequence.params.prompt_logprobs = sequence.params.prompt_logprobs, None
    return None if found is None else tuple(found)


def logprobs_of(sampled: Sampled, row: int, n_tokens: int, wanted: int) -> tuple[TokenLogprob, ...]:
    """Of the first tokens of one row of `by_sequence`, with `wanted` of the most likely ones."""
    result = []
    for i in range(n_tokens):
        top: tuple[tuple[int, float], ...] = ()
        if wanted:
            ids, values = sampled.top_tokens_RJ[i, row, :wanted], sampled.top_logprobs_RJ[i, row, :wanted]
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        result.append(TokenLogprob(float(sampled.logprobs_R[i, row]), int(sampled.ranks_R[i, row]), top))
    return tuple(result)
