"""TrainSettings: how a model is trained. What the model is stands in LlamaConfig."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

from ..config import check_count, check_positive
from ..errors import ConfigError, TrainingError

COMPUTE_DTYPES = ("float32", "bfloat16")  # float16 would need its loss scaled
EXPORT_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Raises TrainingError, naming the field, when a value is of the wrong type or out of range."""

    steps: int = 1000  # optimizer steps
    batch: int = 32  # windows per step, over the whole mesh
    length: int = 256  # tokens that a window is scored on; its context is as long
    learning_rate: float = 1e-3  # at the end of the warm-up
    warmup_steps: int = 100
    weight_decay: float = 0.1  # of matrices; norms are not decayed
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # largest global norm of a gradient
    dropout: float = 0.0  # of the embedding and of every residual branch
    seed: int = 0  # of weights, dropout and the choice of windows
    holdout: float = 0.1  # the last part of the text, never trained on
    eval_every: int = 100  # steps between held-out losses
    save_every: int = 100  # steps between saved states
    compute_dtype: str = "float32"  # of the forward and backward pass; weights and optimizer stay float32
    export_dtype: str = "bfloat16"  # of the exported checkpoint

    def __post_init__(self) -> None:
        try:
            for name in ("steps", "batch", "length", "eval_every", "save_every"):
                check_count(name, getattr(self, name))
            for name in ("learning_rate", "grad_clip"):
                check_positive(name, getattr(self, name))
        except ConfigError as error:
            raise TrainingError(f"training settings: {error}") from None
        self._check_range("warmup_steps", int, lambda x: 0 <= x < self.steps, "from 0 to below steps")
        self._check_range("seed", int, lambda x: 0 <= x < 2**32, "from 0 to below 2**32")
        self._check_range("weight_decay", float, lambda x: 0 <= x < math.inf, "from 0")
        self._check_range("holdout", float, lambda x: 0 < x < 1, "above 0 and below 1")
        for name in ("beta1", "beta2", "dropout"):
            self._check_range(name, float, lambda x: 0 <= x < 1, "from 0 to below 1")
        for name, allowed in (("compute_dtype", COMPUTE_DTYPES), ("export_dtype", EXPORT_DTYPES)):
            if getattr(self, name) not in allowed:
                raise TrainingError(
                    f"training settings: {name}={getattr(self, name)!r} is not one of {', '.join(allowed)}."
                )

    def _check_range(self, name: str, kind: type, allowed: Callable[[Any], bool], what: str) -> None:
        value = getattr(self, name)
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        if not number or not allowed(value):
            raise TrainingError(
                f"training settings: {name}={value!r} must be a {'whole ' if kind is int else ''}number {what}."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings that `values`, such as a config's `train`, changes. Raises TrainingError for unknown ones."""
        given = dict(values.items())
        names = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                raise TrainingError(f"training settings: there is no {name!r}; there are {', '.join(names)}.")
        return cls(**given)
