"""The settings of the entropy sampler, and the same of many rows as an array.

The idea and the constants are those of the quadrant sampler of xjdr-alt/entropix in its first published form.
`entropy.py` says what each is for, in formulas.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from ..errors import RequestError
from .numbers import is_integer, is_number

MAX_TOP_K = 100
MAX_CANDIDATES = 16
MAX_WEIGHT = 100.0
MAX_PAUSE_TOKEN = 2**24 - 1  # float32 has every whole number up to it
NO_TOKEN = -1


class _Bounds(NamedTuple):
    least: float
    most: float
    above: bool = False  # the least itself is not allowed

    def __str__(self) -> str:
        if self.above:
            return f"above {self.least:g} and at most {self.most:g}"
        return f"from {self.least:g} to {self.most:g}"


TEMPERATURE, ABOVE_0 = _Bounds(0.0, 100.0), _Bounds(0.0, 100.0, above=True)
MASS, SHARE = _Bounds(0.0, 1.0, above=True), _Bounds(0.0, 1.0)
TOP_K, WEIGHT, BITS = _Bounds(1, MAX_TOP_K), _Bounds(0.0, MAX_WEIGHT), _Bounds(0.0, 1000.0)


def _setting(default: float, bounds: _Bounds) -> Any:
    return dataclasses.field(default=default, metadata={"bounds": bounds})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropySettings:
    """How the entropy sampler chooses a request's tokens.

    H and V are entropy (bits) and varentropy (bits^2) of the next token's distribution, aH and aV those of the last
    layer's attention, agree and inter its agreement and interaction. `temperature`, `top_p`, `top_k` and `min_p` are
    what the strategies start from.

    Raises RequestError on values out of bounds, and where limits contradict one another.
    """

    temperature: float = _setting(0.666, TEMPERATURE)  # T; 0: greedy throughout
    top_p: float = _setting(0.90, MASS)
    top_k: int = _setting(27, TOP_K)
    min_p: float = _setting(0.03, SHARE)
    candidates: int = _setting(5, _Bounds(1, MAX_CANDIDATES))  # draws of the adaptive strategy, of which one is kept
    pause_token: int | None = None  # chosen where the model is evenly unsure, but never twice in a row; None: none

    low_entropy: float = _setting(0.1, BITS)
    medium_entropy: float = _setting(3.0, BITS)
    high_entropy: float = _setting(5.0, BITS)
    low_varentropy: float = _setting(0.1, BITS)  # bits^2, as the next
    high_varentropy: float = _setting(5.0, BITS)

    # Pause, where no pause token can be chosen: T' = min(max, T (temperature + attention_entropy aH)).
    pause_temperature: float = _setting(1.3, ABOVE_0)
    pause_attention_entropy: float = _setting(0.2, WEIGHT)
    pause_max_temperature: float = _setting(1.5, ABOVE_0)

    # Explore: T' = min(max, T (temperature + interaction inter)),
    # top_k' = max(min_top_k, floor(top_k (1 + disagreement (1 - agree)))).
    explore_temperature: float = _setting(1.2, ABOVE_0)
    explore_interaction: float = _setting(0.3, WEIGHT)
    explore_max_temperature: float = _setting(1.5, ABOVE_0)
    explore_disagreement: float = _setting(0.5, WEIGHT)
    explore_min_top_k: int = _setting(5, TOP_K)

    # Resample: T' = min(max, T (temperature + attention_varentropy aV)),
    # top_p' = max(min_top_p, top_p - attention_entropy aH).
    resample_temperature: float = _setting(2.0, ABOVE_0)
    resample_attention_varentropy: float = _setting(0.5, WEIGHT)
    resample_max_temperature: float = _setting(2.0, ABOVE_0)
    resample_attention_entropy: float = _setting(0.2, WEIGHT)
    resample_min_top_p: float = _setting(0.5, MASS)

    # Adaptive, with U = H + V and Ua = aH + aV:
    # T' = T (1 + uncertainty U + attention_uncertainty Ua - agreement agree). agree is at most a half, and so T' > 0.
    adaptive_uncertainty: float = _setting(0.3, WEIGHT)
    adaptive_attention_uncertainty: float = _setting(0.2, WEIGHT)
    adaptive_agreement: float = _setting(0.2, SHARE)
    # top_p' = clip(top_p (1 + top_p_attention_varentropy aV), min_top_p, max_top_p).
    adaptive_top_p_attention_varentropy: float = _setting(0.1, WEIGHT)
    adaptive_min_top_p: float = _setting(0.1, MASS)
    adaptive_max_top_p: float = _setting(1.0, MASS)
    # top_k' = clip(round(top_k (1 + top_k_interaction inter - top_k_agreement agree)), min_top_k, max_top_k).
    adaptive_top_k_interaction: float = _setting(0.3, WEIGHT)
    adaptive_top_k_agreement: float = _setting(0.2, WEIGHT)
    adaptive_min_top_k: int = _setting(1, TOP_K)
    adaptive_max_top_k: int = _setting(MAX_TOP_K, TOP_K)
    # min_p' = clip(min_p (1 - min_p_uncertainty U), min_min_p, max_min_p).
    adaptive_min_p_uncertainty: float = _setting(0.5, WEIGHT)
    adaptive_min_min_p: float = _setting(0.01, SHARE)
    adaptive_max_min_p: float = _setting(0.5, SHARE)

    # Score of a candidate: log p + entropy (1 - H) + attention_entropy (1 - aH) + varentropy (1 - V)
    # + attention_varentropy (1 - aV) + agreement agree + interaction inter.
    score_entropy: float = _setting(0.1, WEIGHT)
    score_attention_entropy: float = _setting(0.2, WEIGHT)
    score_varentropy: float = _setting(0.3, WEIGHT)
    score_attention_varentropy: float = _setting(0.4, WEIGHT)
    score_agreement: float = _setting(0.5, WEIGHT)
    score_interaction: float = _setting(0.6, WEIGHT)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if bounds := field.metadata.get("bounds"):
                self._check_bounds(field.name, bounds, whole=field.type is int)
        token = self.pause_token
        if token is not None and not (is_integer(token) and 0 <= token <= MAX_PAUSE_TOKEN):
            raise _wrong("pause_token", token, f"None or a token id from 0 to {MAX_PAUSE_TOKEN}")
        for low, high in _ORDERED:
            if getattr(self, low) > getattr(self, high):
                raise _wrong(low, getattr(self, low), f"at most {high}={getattr(self, high):g}")

    def _check_bounds(self, name: str, bounds: _Bounds, whole: bool) -> None:
        value = getattr(self, name)
        fits = (is_integer if whole else is_number)(value) and bounds.least <= value <= bounds.most
        if not fits or (bounds.above and value == bounds.least):
            raise _wrong(name, value, f"a {'whole ' if whole else ''}number {bounds}")


_ORDERED = (
    ("low_entropy", "medium_entropy"),
    ("medium_entropy", "high_entropy"),
    ("low_varentropy", "high_varentropy"),
    ("adaptive_min_top_p", "adaptive_max_top_p"),
    ("adaptive_min_top_k", "adaptive_max_top_k"),
    ("adaptive_min_min_p", "adaptive_max_min_p"),
)

_NAMES = tuple(field.name for field in dataclasses.fields(EntropySettings))
N_SETTINGS = len(_NAMES)

# One array (R,) for each field of EntropySettings, under its name. All are float32; pause_token is NO_TOKEN for none.
SettingColumns = NamedTuple("SettingColumns", [(name, Any) for name in _NAMES])


def pack_settings(settings: EntropySettings) -> np.ndarray:
    """The settings as one row (N_SETTINGS,) float32, in the order of the fields."""
    values = (getattr(settings, name) for name in _NAMES)
    return np.array([NO_TOKEN if value is None else value for value in values], np.float32)


def unpack_settings(packed_RX: Any) -> SettingColumns:
    """Rows of `pack_settings`, (R, N_SETTINGS) float32 on host or device, as columns (R,)."""
    return SettingColumns(*(packed_RX[:, i] for i in range(N_SETTINGS)))


def _wrong(name: str, value: Any, right: str) -> RequestError:
    return RequestError(f"entropy setting {name}={repr(value)[:200]} must be {right}.")
