"""A comparison as text for people and as JSON for programs."""

import dataclasses
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..json_file import write_json
from .components import AXIS_NAMES, HEAD_AXES
from .contract import ATOL, RTOL
from .output_file import naming, replacing
from .results import CUMULATIVE, ISOLATED, MODES, Difference, GreedyRow, LogitsRow, Report, Row

WIDTH = 120
MAX_NAME = 14  # of a component or way in a table, so that its lines fit
LAYERS = "layers"  # what the names of layers' stages begin with

TITLES = {
    ISOLATED: "Isolated: every component is fed the reference's own inputs",
    CUMULATIVE: "Cumulative: every component is fed what the engine computed before",
}
# What the columns of a table mean, where their names do not say it.
NOTES = {
    "first": "first, last: relative error of the first and the last layer",
    "noise": "noise: relative error of the reference itself against a run in higher precision, in the last layer",
    "judged": "judged: what the bound is for, in half precision the distance from what exact arithmetic gives",
}

Line = dict[str, str]  # of a table: cells by column


def to_text(report: Report, *, every_layer: bool = False) -> str:
    """The report in plain text of at most 120 columns, without a newline at its end.

    Relative errors are norms of the difference over norms of the reference. A line sums up all layers of a component:
    the largest errors, the share of equal values, and the layer that is nearest to its bound or beyond it.
    `every_layer` gives each layer a line.
    """
    blocks = [_settings(report.settings)]
    for mode in MODES:
        rows = [row for row in report.rows if row.mode == mode]
        if rows:
            blocks.append([_title(mode, rows, every_layer), *_table(_lines(mode, rows, every_layer))])
    blocks += [_logits(report.logits), _greedy(report.greedy), _verdict(report)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def to_json(report: Report) -> dict[str, Any]:
    """The report in the fields of `results`, and which rows passed. Numbers that are NaN or infinite become null."""
    failure = report.first_failure
    return {
        "passed": report.passed,
        "first_failure": None if failure is None else _json_row(failure),
        "settings": _json_value(report.settings),
        "rows": [_json_row(row) for row in report.rows],
        "logits": [_json_row(row) for row in report.logits],
        "greedy": [_json_row(row) for row in report.greedy],
    }


def write_json_report(report: Report, file: str | os.PathLike[str]) -> None:
    """Writes `to_json`. A file that is there is replaced at the end. Raises ParityError when it cannot be written."""
    file = Path(file)
    with replacing(file) as temporary, naming(file):
        write_json(temporary, to_json(report))


def _json_row(row: Row | LogitsRow | GreedyRow) -> dict[str, Any]:
    fields = {field.name: _json_value(getattr(row, field.name)) for field in dataclasses.fields(row)}
    return fields | {"passed": bool(row.passed)}


def _json_value(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if hasattr(value, "_asdict"):  # a named tuple
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): _json_value(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(x) for x in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


# The blocks of the text


def _settings(settings: dict[str, Any]) -> list[str]:
    """ "name: value" lines, values in one column."""
    names = {_plain(name): _plain(value) for name, value in settings.items()}
    indent = min(max(map(len, names), default=0), WIDTH // 3) + 2
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False).wrap
    return [line for name, value in names.items() for line in wrap(f"{name}: ".ljust(indent) + value)]


def _title(mode: str, rows: Sequence[Row], every_layer: bool) -> str:
    count = len({row.stage for row in rows if _is_layer(row)})
    return TITLES[mode] + (f" (the worst of {count} layers)" if count > 1 and not every_layer else "")


def _lines(mode: str, rows: Sequence[Row], every_layer: bool) -> list[Line]:
    """The lines of a mode's table."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        stage = LAYERS if _is_layer(row) and not every_layer else row.stage
        groups.setdefault((stage, row.component), []).append(row)
    lines = []
    for (stage, component), group in groups.items():
        worst = max(group, key=_severity)
        growth = mode == CUMULATIVE and stage == LAYERS
        lines.append(
            {
                "stage": stage if every_layer else "",
                "component": _cut(component),
                "first": _number(group[0].difference.relative) if growth else "",
                "last": _number(group[-1].difference.relative) if growth else "",
                "noise": _number(group[-1].noise),
                "relative": _number(max((row.difference.relative for row in group), key=_nan_last)),
                "max abs": _number(max((row.difference.max_abs for row in group), key=_nan_last)),
                "bit-equal": _share(math.fsum(row.difference.bit_equal for row in group) / len(group)),
                "worst in": "" if every_layer else worst.stage,
                "judged": _number(worst.judged),
                "bound": _number(worst.bound),
                "verdict": _word(worst),
            }
        )
    return lines


def _logits(rows: Sequence[LogitsRow]) -> list[str]:
    if not rows:
        return []
    lines = [
        {
            "way": _cut(row.way),
            "relative": _number(row.difference.relative),
            "max abs": _number(row.difference.max_abs),
            "KL mean": _number(row.kl_mean),
            "KL max": _number(row.kl_max),
            "top-1": _share(row.top1),
            "top-5": _share(row.top5),
            "judged": _number(row.judged),
            "bound": _number(row.bound),
            "verdict": _word(row),
        }
        for row in rows
    ]
    apart = [f"  {row.way}: some values are beyond rtol {RTOL:g}, atol {ATOL:g}" for row in rows if not row.close]
    return ["Logits of the whole prompt through the compiled model (KL in nats per token)", *_table(lines), *apart]


def _greedy(rows: Sequence[GreedyRow]) -> list[str]:
    """One line when all are equal, else one for each row that is not."""
    if not rows:
        return []
    different = [row for row in rows if row.first_difference is not None]
    lengths = sorted({row.length for row in rows})
    tokens = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    title = f"Greedy continuation by {tokens} tokens: {len(rows) - len(different)} of {len(rows)} rows are equal"
    lines = [
        {
            "row": str(row.row),
            "first different step": str(row.first_difference),
            "ours": str(row.ours),
            "reference": str(row.theirs),
            "margin": _number(row.margin),
            "our margin": _number(row.own_margin),
            "noise": _number(row.noise),
            "verdict": "-" if row.noise is None else "ok (undecided: margin within noise)" if row.passed else "FAIL",
        }
        for row in different
    ]
    return [title, *(_table(lines, explained=False) if lines else [])]


def _verdict(report: Report) -> list[str]:
    failure = report.first_failure
    if failure is None:
        equal = sum(row.difference.bit_equal == 1 for row in report.rows)
        text = f"PASS: {_count(report.rows, 'component')} compared, {equal} of them equal bit for bit"
        others = [(report.logits, "way to the logits", "ways to the logits"), (report.greedy, "greedy row")]
        return textwrap.wrap(text + "".join(f"; {_count(*names)}" for names in others if names[0]) + ".", WIDTH)
    failed = [
        f"{sum(not row.passed for row in rows)} of {_count(rows, *names)}"
        for rows, *names in (
            (report.rows, "component"),
            (report.logits, "way to the logits", "ways to the logits"),
            (report.greedy, "greedy row"),
        )
        if rows
    ]
    return [*textwrap.wrap(f"FAIL: {_describe(failure)}", WIDTH), f"Failed: {', '.join(failed)}."]


def _describe(row: Row | LogitsRow | GreedyRow) -> str:
    """What is wrong with a row that did not pass."""
    if isinstance(row, GreedyRow):
        margins = f"Its margin is {_number(row.margin)}, ours {_number(row.own_margin)}"
        return (
            f"greedy, row {row.row}, step {row.first_difference}: ours is token {row.ours}, the reference's "
            f"{row.theirs}. {margins}: beyond the noise of {_number(row.noise)}."
        )
    if isinstance(row, Row):
        place, axes = f"{row.mode}, {row.stage}, {row.component}", row.axes
    else:
        place, axes = f"logits, {row.way}", HEAD_AXES["logits"]
    if math.isnan(row.judged):
        problem = "the relative distance is nan: there are values that are not finite"
    elif row.bound is not None and row.judged > row.bound:
        problem = f"the relative distance {_number(row.judged)} is beyond the bound {_number(row.bound)}"
    else:
        problem = f"some values are beyond rtol {RTOL:g}, atol {ATOL:g}"
    return f"{place}: {problem}. {_worst(row.difference, axes)}".rstrip()


def _worst(difference: Difference, axes: str) -> str:
    if difference.worst is None:
        return ""
    position, ours, theirs = difference.worst
    words = ", ".join(f"{AXIS_NAMES.get(axis, axis)} {i}" for axis, i in zip(axes, position, strict=True))
    return f"The worst value is at {words}: ours {ours:.9g}, the reference's {theirs:.9g}."


# Cells


def _table(lines: Sequence[Line], *, explained: bool = True) -> list[str]:
    """Aligned columns without those that say nothing, and a line for each that needs to be explained."""
    columns = [name for name in lines[0] if any(line[name] for line in lines)]
    if "judged" in columns and all(line["judged"] == line["relative"] for line in lines):
        columns.remove("judged")
    widths = {name: max(len(name), *(len(line[name]) for line in lines)) for name in columns}
    left = {"stage", "component", "way", "row", "verdict"}

    def row(cells: Line) -> str:
        padded = (cells[c].ljust(widths[c]) if c in left else cells[c].rjust(widths[c]) for c in columns)
        return "  " + "  ".join(padded).rstrip()

    notes = [f"  {NOTES[name]}" for name in columns if explained and name in NOTES]
    return [row({name: name for name in columns}), *(row(line) for line in lines), *notes]


def _is_layer(row: Row) -> bool:
    return row.stage.startswith(LAYERS)


def _severity(row: Row) -> tuple[bool, float]:
    """Sorts rows by how near to their bound, or how far beyond it, they are."""
    ratio = row.judged / row.bound if row.bound else row.judged
    return not row.passed, _nan_last(ratio)


def _nan_last(x: float) -> float:
    return math.inf if math.isnan(x) else x


def _word(row: Row | LogitsRow) -> str:
    return "FAIL" if not row.passed else "-" if row.bound is None else "ok"


def _number(x: float | None) -> str:
    """Three digits; nothing for None."""
    return "" if x is None else "0" if x == 0 else f"{x:.2e}"


def _cut(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 3] + "..."


def _share(x: float) -> str:
    """A percentage, rounded down: 100% means all."""
    return "100%" if x == 1 else f"{x:.0%}" if not math.isfinite(x) else f"{math.floor(x * 1e4) / 100:.2f}%"


def _count(rows: Sequence[Any], one: str, many: str | None = None) -> str:
    return f"{len(rows)} {one if len(rows) == 1 else many or one + 's'}"


def _plain(text: Any) -> str:
    """On one line, without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
