"""The flags that show how sure the model was of its answers."""

import math
from pathlib import Path
from typing import Any

from absl import flags

from sharded_llama.engine.outputs import CompletionOutput, RequestOutput
from sharded_llama.errors import RequestError
from sharded_llama.sampling.entropy import Strategy
from sharded_llama.tokenizer import Tokenizer

from .metrics_view import MAX_TOKENS, MetricsPrinter, check_picture, write_picture

SHOW_METRICS = flags.DEFINE_bool(
    "show_metrics", False, "Tint the text by how sure the entropy sampler found the model, and draw that as a picture."
)
METRICS_PICTURE = flags.DEFINE_string(
    "metrics_picture",
    None,
    "File (.png, .svg, .pdf) of that picture; of several answers x-1.png, x-2.png ... Default: metrics.png; '': none.",
)

DEFAULT_PICTURE = "metrics.png"
MAX_PICTURES = 64  # of one run: drawing one takes a second


def check_flags(settings: dict[str, Any]) -> None:
    """Raises RequestError where there are no metrics to show. `settings` are those of the sampler."""
    if SHOW_METRICS.value and "entropy" not in settings:
        raise RequestError("--show_metrics shows what the entropy sampler saw: add --sampler=entropy.")
    if METRICS_PICTURE.value is not None and not SHOW_METRICS.value:
        raise RequestError(f"--metrics_picture={METRICS_PICTURE.value} is drawn with --show_metrics alone: add that.")


def pictures(n_answers: int) -> list[Path]:
    """The file of each answer's picture; none where no pictures are wanted. Raises RequestError for too many."""
    name = DEFAULT_PICTURE if METRICS_PICTURE.value is None else METRICS_PICTURE.value
    if not SHOW_METRICS.value or not name:
        return []
    if n_answers > MAX_PICTURES:
        raise RequestError(
            f"{n_answers} answers would have a picture each, at most {MAX_PICTURES} are drawn: ask for fewer answers, "
            "or for none drawn by --metrics_picture= with nothing after it."
        )
    path = Path(name)
    return [path] if n_answers == 1 else [path.with_stem(f"{path.stem}-{i + 1}") for i in range(n_answers)]


def check_view(n_answers: int) -> None:
    """Raises RequestError when the metrics of so many answers could not be shown, before there are any."""
    make_view()
    for path in pictures(n_answers):
        check_picture(path)


def make_view() -> MetricsPrinter | None:
    """What tints the text, if that is wanted. Raises RequestError when a package is missing."""
    return MetricsPrinter() if SHOW_METRICS.value else None


def draw_pictures(outputs: list[RequestOutput], tokenizer: Tokenizer) -> list[Path]:
    """Draws what was wanted, of each answer its first MAX_TOKENS tokens. Returns the files; no tokens, no file."""
    answers = [answer for output in outputs for answer in output.outputs]
    drawn = []
    for path, answer in zip(pictures(len(answers)), answers, strict=False):
        if metrics := (answer.metrics or ())[:MAX_TOKENS]:
            texts = [tokenizer.decode([i], skip_special=False) for i in answer.token_ids[: len(metrics)]]
            write_picture(path, texts, list(metrics))
            drawn.append(path)
    return drawn


def metrics_records(answer: CompletionOutput) -> list[dict[str, Any]]:
    """The metrics of each token for JSON: the strategy by its name, what is no finite number as null."""
    return [
        {name: value if math.isfinite(value) else None for name, value in m._asdict().items()}
        | {"strategy": Strategy(m.strategy).name.lower()}
        for m in answer.metrics or ()
    ]
