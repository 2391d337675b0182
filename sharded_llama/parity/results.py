"""The results of a comparison, as plain data."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

ISOLATED, CUMULATIVE = "isolated", "cumulative"
MODES = (ISOLATED, CUMULATIVE)


class Worst(NamedTuple):
    """Where two arrays differ most."""

    position: tuple[int, ...]  # an index for each axis
    ours: float
    theirs: float


class Difference(NamedTuple):
    """How an array differs from the reference's."""

    max_abs: float  # NaN or infinite where one of the arrays has values that are not finite
    relative: float  # norm of the difference over norm of the reference; then NaN
    bit_equal: float  # share of values with the same bits; of different types: equal values
    worst: Worst | None  # None where nothing differs


def _within(judged: float, bound: float | None) -> bool:
    """Values that are not finite never pass, whatever is expected; nor does a bound that is not."""
    return math.isfinite(judged) and (bound is None or judged <= bound < math.inf)


@dataclass(frozen=True)
class Row:
    """One component of one stage."""

    mode: str  # ISOLATED: fed the reference's own inputs; CUMULATIVE: fed what the engine computed before
    stage: str
    component: str
    axes: str  # of `difference.worst.position`, such as "BLHK"
    difference: Difference
    noise: float | None  # how far the reference itself is from a run in higher precision, cumulatively
    judged: (
        float  # the relative distance that the bound is for: from the reference, in half precision from exact values
    )
    bound: float | None  # None: the contract has none

    @property
    def passed(self) -> bool:
        return _within(self.judged, self.bound)


@dataclass(frozen=True)
class LogitsRow:
    """The logits of the whole prompt, computed in one of several ways through the compiled model."""

    way: str  # "one piece", "chunks of 8", "token by token"
    difference: Difference
    judged: float
    bound: float | None
    close: bool  # float32: within rtol 1e-3 and atol 1e-2 everywhere; true for other types
    kl_mean: float  # Kullback-Leibler divergence of the engine's distribution from the reference's, nats per token
    kl_max: float
    top1: float  # share of positions whose most likely token is the same
    top5: float  # mean share of the reference's five most likely tokens that are among ours

    @property
    def passed(self) -> bool:
        return self.close and _within(self.judged, self.bound)


@dataclass(frozen=True)
class GreedyRow:
    """The greedy continuation of one row."""

    row: int
    length: int  # new tokens compared
    first_difference: int | None  # step; None: all are equal
    ours: int | None  # token ids at that step
    theirs: int | None
    margin: float | None  # the reference's there
    noise: float | None  # margins below this are undecided; None: no bound
    own_margin: float = 0.0  # there, the engine's logit of its token less that of the reference's

    @property
    def passed(self) -> bool:
        """The reference must be undecided between its two best tokens, and the engine between its own and theirs."""
        if self.first_difference is None or self.noise is None:
            return True
        return max(self.margin, self.own_margin) <= self.noise < math.inf


@dataclass(frozen=True)
class Report:
    """A whole comparison. `passed` says whether the numerics contract holds."""

    settings: dict[str, Any]  # what was compared with what: JSON values
    rows: tuple[Row, ...]  # in the order of computation
    logits: tuple[LogitsRow, ...]
    greedy: tuple[GreedyRow, ...]

    @property
    def first_failure(self) -> Row | LogitsRow | GreedyRow | None:
        """The first component that left its bound: of the isolated ones if any did, else of the cumulative ones."""
        isolated = [row for row in self.rows if row.mode == ISOLATED]
        others = [row for row in self.rows if row.mode != ISOLATED]
        return next((row for row in (*isolated, *others, *self.logits, *self.greedy) if not row.passed), None)

    @property
    def passed(self) -> bool:
        return bool(self.rows) and self.first_failure is None
