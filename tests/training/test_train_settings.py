"""TrainSettings refuses what cannot work, by name."""

import dataclasses
import re

import pytest

from sharded_llama.errors import TrainingError
from sharded_llama.training.settings import TrainSettings

BAD = [
    ("steps", 0, "whole number of at least 1"),
    ("batch", 2.5, "whole number of at least 1"),
    ("length", True, "whole number of at least 1"),
    ("eval_every", -1, "whole number of at least 1"),
    ("save_every", "often", "whole number of at least 1"),
    ("learning_rate", 0.0, "greater than 0"),
    ("grad_clip", float("inf"), "finite"),
    ("warmup_steps", 1000, "whole number from 0 to below steps"),
    ("warmup_steps", None, "whole number from 0 to below steps"),
    ("weight_decay", -0.1, "number from 0"),
    ("weight_decay", float("nan"), "number from 0"),
    ("beta1", 1.0, "number from 0 to below 1"),
    ("beta2", 1, "number from 0 to below 1"),
    ("dropout", 1.0, "number from 0 to below 1"),
    ("seed", -1, "whole number from 0 to below 2**32"),
    ("holdout", 0.0, "number above 0 and below 1"),
    ("holdout", 1.0, "number above 0 and below 1"),
    ("compute_dtype", "float16", "float32, bfloat16"),
    ("export_dtype", "int8", "float32, bfloat16, float16"),
]


@pytest.mark.parametrize(("name", "value", "right"), BAD, ids=lambda x: repr(x)[:12])
def test_bad_values(name, value, right):
    with pytest.raises(TrainingError, match=f"training settings: {name}={re.escape(repr(value))} .*{re.escape(right)}"):
        TrainSettings(**{name: value})


def test_from_dict():
    assert TrainSettings.from_dict({}) == TrainSettings()
    assert TrainSettings.from_dict({"steps": 5, "warmup_steps": 0, "dropout": 0}).steps == 5
    changed = TrainSettings(steps=7, warmup_steps=0, compute_dtype="bfloat16")
    assert TrainSettings.from_dict(dataclasses.asdict(changed)) == changed
    with pytest.raises(TrainingError, match=r"there is no 'lr'; there are steps, batch, .*export_dtype"):
        TrainSettings.from_dict({"lr": 0.1})
