"""The numerics contract (docs/design.md): how far each component may be from the reference.

Distances are norms of the difference over norms of the reference. A rule gives two numbers: the distance that is judged
and the bound that it is held to, None where the contract has none.
"""

import ml_dtypes
import numpy as np

from .measure import distance
from .results import CUMULATIVE, ISOLATED

# What is expected of a comparison. EXACT: two engines run the same programs on the same weights, so that cumulative
# components are equal; isolated ones and whole prompts come from other programs and are held to the contract.
# NO_BOUND: nothing, as between two types.
EXACT, CONTRACT, NO_BOUND = "exact", "contract", "no bound"

FLOAT64 = 1e-10
FLOAT32_LEAF = 1e-6  # a component fed the reference's own inputs
FLOAT32_LAYER = 3e-6  # a whole layer fed the reference's input
FLOAT32_LOGITS = 1e-5  # at least; else NOISE times the reference's own distance from float64
NOISE = 1.5
HALF = 1.25  # times the reference's own distance from float32
RTOL, ATOL = 1e-3, 1e-2  # float32 logits, everywhere

WHOLE_LAYER = "layer"
COPIES = ("k_cache", "v_cache")  # what the cache holds is what was written
SHARDED_SUMS = ("attn_wo", "down")  # each shard of `model` rounds its part before the parts are added


def unit_roundoff(dtype: str) -> float:
    """The largest relative error of rounding to `dtype`: 2^-8 for bfloat16, 2^-11 for float16."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


def judge(
    mode: str,
    component: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    *,
    exact: np.ndarray | None,
    noise: float | None,
    dtype: str,
    shards: int,
    expect: str,
) -> tuple[float, float | None]:
    """(judged distance, bound) of a component.

    Args:
      mode: ISOLATED or CUMULATIVE.
      exact: in half precision, the component in float32 of the same inputs; for cumulative logits, those of a whole
        run in float32. None where the reference has none.
      noise: the reference's own distance from a run in higher precision, or None.
      dtype: of the model and, under CONTRACT, of the reference.
      shards: of the mesh's `model` axis.
      expect: EXACT, CONTRACT or NO_BOUND.
    """
    apart = distance(ours, theirs)
    if expect == NO_BOUND:
        return apart, None
    if expect == EXACT and mode == CUMULATIVE:
        return apart, 0.0
    if mode == ISOLATED and component in COPIES:
        return apart, 0.0
    if dtype == "float64":
        return apart, FLOAT64
    if dtype == "float32":
        if mode == ISOLATED:
            return apart, FLOAT32_LAYER if component == WHOLE_LAYER else FLOAT32_LEAF
        return apart, max(FLOAT32_LOGITS, NOISE * (noise or 0.0))
    if mode == ISOLATED and component != WHOLE_LAYER:
        # One unit for a component that is rounded once. The roundings of the parts of a sum add up like noise.
        rounding = unit_roundoff(dtype) * (shards**0.5 if component in SHARDED_SUMS else 1)
        if exact is None:
            return apart, 2 * rounding  # ours and theirs
        return distance(ours, exact), max(HALF * distance(theirs, exact), rounding)
    if component == "logits" and exact is not None:
        return distance(ours, exact), HALF * distance(theirs, exact)
    return apart, None
