"""Results as a picture. Needs matplotlib, an extra."""

import importlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
# The colours of Okabe and Ito, which colour-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
SIZE = (7.0, 4.5)  # inches


def check_matplotlib() -> None:
    """Raises ConfigError when no picture could be drawn."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError(
            f"pictures need a package: pip install 'sharded-llama[view]', or give --nopicture ({error})."
        ) from error


def draw(mode: str, rows: Sequence[Row], title: str, path: Path) -> None:
    """Draws the rows of a mode to a .png file, which is whole or not there. Raises ConfigError when it cannot."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    axes = figure.subplots()
    drawers: dict[str, Callable[[Axes, Sequence[Row]], None]] = {
        "latency": _shares,
        "prefill": _shares,
        "throughput": _curve,
        "load": _loads,
        "startup": _phases,
        "start": _phases,
    }
    drawers[mode](axes, rows)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{path}: the picture cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _shares(axes: "Axes", rows: Sequence[Row]) -> None:
    """Per cent of the limit that each row reaches; of milliseconds where there is no limit."""
    names = [_name(row) for row in rows]
    if any("share" in row for row in rows):
        heights, label, form = [100 * row.get("share", 0) for row in rows], "share of the limit, %", "{:.0f} %"
        axes.axhline(100, color="#606060", lw=0.8)
    else:
        heights, label, form = [row["ms"] for row in rows], "ms", "{:.3g}"
    bars = axes.bar(names, heights, color=[COLOURS[row["what"] != rows[0]["what"]] for row in rows])
    texts = [f"{form.format(height)}\n{row['ms']:.3g} ms" for height, row in zip(heights, rows, strict=True)]
    axes.bar_label(bars, texts, fontsize=8)
    axes.margins(y=0.2)
    axes.set_ylabel(label)


def _name(row: Row) -> str:
    if row["what"] == "decode":
        return f"decode\nbatch {row['batch']}"
    return f"{row['what']}\n{row['rows']}x{row['tokens']}"


def _curve(axes: "Axes", rows: Sequence[Row]) -> None:
    """Tokens per second against the time of a token, a point for each bound of requests under way."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    for name, colour in zip(workloads, itertools.cycle(COLOURS), strict=False):
        group = [row for row in rows if row["workload"] == name]
        which = "tpot_ms" if all(row["tpot_ms"] for row in group) else "e2e_ms"
        x, y = [row[which]["p50"] for row in group], [row["output_tokens_per_s"] for row in group]
        axes.plot(x, y, "o-", color=colour, label=f"{name} ({which.removesuffix('_ms').upper()})")
        for row, *point in zip(group, x, y, strict=True):
            axes.annotate(f" {row['concurrency'] or row['at_once']}", point, fontsize=8)
    axes.set_xlabel("median latency, ms")
    axes.set_ylabel("output tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, title="numbers: requests at a time", title_fontsize=8)


def _loads(axes: "Axes", rows: Sequence[Row]) -> None:
    samples = [sample for row in rows for sample in row["samples"]]
    axes.bar([f"{n}" for n in range(1, len(samples) + 1)], samples, color=COLOURS[0])
    axes.set_xlabel("load")
    axes.set_ylabel("seconds")


def _phases(axes: "Axes", rows: Sequence[Row]) -> None:
    left = [0.0] * len(rows)
    names = [row.get("cache", "start") for row in rows]
    phases = list(dict.fromkeys(phase for row in rows for phase in row["phases"]))
    for phase, colour in zip(phases, itertools.cycle(COLOURS), strict=False):
        seconds = [row["phases"].get(phase, 0.0) for row in rows]
        axes.barh(names, seconds, left=left, color=colour, label=phase)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.legend(fontsize=8)
