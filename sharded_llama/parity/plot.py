"""A comparison as a picture: relative error by layer and component. Needs matplotlib, an extra."""

import importlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ParityError
from .components import EMBEDDING, HEAD, layer_stage
from .output_file import naming, replacing
from .results import CUMULATIVE, ISOLATED, MODES, Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "svg", "pdf")
TITLES = {
    ISOLATED: "Isolated: every component is fed the reference's own inputs",
    CUMULATIVE: "Cumulative: every component is fed what the engine computed before",
}
# The colours of Okabe and Ito, which colour-blind people can tell apart, without the pale yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (7, 1.5, 1.5, 1.5)))
MARKERS = "osD^"
BOUND = {"linestyle": (0, (4, 2)), "linewidth": 1.1}
GREY, RED = "#606060", "#D00000"
MANY_LAYERS = 40  # whose lines need no markers
LOWEST, HIGHEST = 1e-300, 1e300  # of the axis


def plot(report: Report, file: str | os.PathLike[str]) -> None:
    """Draws a report as PNG, SVG or PDF, by the file's ending: a panel per mode, a line per component.

    What is drawn is what the bounds are for: the relative error, in half precision the distance from what exact
    arithmetic gives; components that are equal bit for bit stand on a line of their own. A file that is there is
    replaced at the end. Raises ParityError for another ending, when there is nothing to draw, when matplotlib is
    missing, or when the file cannot be written.
    """
    file = Path(file)
    check_plot(file)
    if not report.rows:
        raise ParityError(f"{file}: the comparison has no components to draw.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = [mode for mode in MODES if any(row.mode == mode for row in report.rows)]
    figure = Figure(figsize=(12, 0.6 + 4.9 * len(modes)), layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    styles = _styles(list(dict.fromkeys(row.component for row in report.rows)))
    handles: dict[str, Any] = {}
    for axes, mode in zip(figure.subplots(len(modes), squeeze=False)[:, 0], modes, strict=True):
        _draw(axes, mode, [row for row in report.rows if row.mode == mode], styles)
        lines, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, lines, strict=True))
    last = [name for name in ("bound", "failed") if name in handles]
    order = [*(name for name in styles if name in handles), *last]
    figure.legend([handles[name] for name in order], order, loc="outside right upper", handlelength=3.5)
    with replacing(file) as temporary, naming(file):
        figure.savefig(temporary, format=file.suffix.lower().removeprefix("."), dpi=120)


def check_plot(file: Path) -> None:
    """Raises ParityError when no picture can be drawn to this file: another ending, or matplotlib is missing."""
    if file.suffix.lower().removeprefix(".") not in FORMATS:
        raise ParityError(f"{file}: a picture's name has to end with {', '.join('.' + x for x in FORMATS)}.")
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as e:
        raise ParityError(f"{file}: pictures need a package: pip install 'sharded_llama[parity]' ({e}).") from e


def _styles(components: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, dashes and marker of each component: 28 that differ."""
    turns = {name: divmod(i, len(COLOURS)) for i, name in enumerate(components)}
    return {
        name: {"color": COLOURS[i], "linestyle": DASHES[turn % len(DASHES)], "marker": MARKERS[turn % len(MARKERS)]}
        for name, (turn, i) in turns.items()
    }


def _draw(axes: "Axes", mode: str, rows: Sequence[Row], styles: dict[str, dict[str, Any]]) -> None:
    """One panel."""
    places = _places([row.stage for row in rows])
    floor, ceiling = _limits(rows)
    groups = {name: [row for row in rows if row.component == name] for name in styles}
    for name, group in groups.items():
        if group:
            x, y = [places[row.stage] for row in group], [_height(row, floor, ceiling) for row in group]
            style = {"linewidth": 1.3, "markersize": 4.5, **styles[name]}
            marker = {"marker": ""} if len(group) > MANY_LAYERS else {}
            axes.plot(x, [math.nan if height == floor else height for height in y], label=name, **style | marker)
            # Not connected: from equal to nearly equal is no growth.
            equal = [place for place, height in zip(x, y, strict=True) if height == floor]
            axes.plot(equal, [floor] * len(equal), label=f"_{name}", **style | {"linestyle": ""})
    _draw_bounds(axes, groups, places, styles)
    failed = [row for row in rows if not row.passed]
    if failed:
        points = [places[row.stage] for row in failed], [_height(row, floor, ceiling) for row in failed]
        axes.plot(*points, "x", label="failed", color=RED, ms=8, mew=1.8, zorder=4)
    for height, text in ((floor, "bit-equal"), (ceiling, "not finite")):
        if height == floor or any(not math.isfinite(row.judged) for row in rows):
            axes.axhline(height, color=GREY, lw=0.8, zorder=0)
            axes.annotate(text, (0.005, height), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points")
    axes.set(yscale="log", ylim=(floor / 2, ceiling * 2), ylabel="relative error", title=TITLES[mode])
    axes.set_xticks(*_ticks(places))
    axes.set_xlim(1.6 * places[EMBEDDING], places[HEAD] - 0.6 * places[EMBEDDING])
    axes.set_xlabel("layer")
    axes.grid(alpha=0.25)


def _draw_bounds(
    axes: "Axes", groups: dict[str, list[Row]], places: dict[str, float], styles: dict[str, dict[str, Any]]
) -> None:
    """Every different bound once: grey where several components share it, else in the component's colour."""
    gap = -places[EMBEDDING]
    sharing: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for name, group in groups.items():
        steps = tuple((places[row.stage], row.bound) for row in group if row.bound)  # 0 is the line of equal bits
        if steps:
            sharing.setdefault(steps, []).append(name)
    for steps, names in sharing.items():
        x, y = zip(*steps, strict=True)
        margin = 0.5 if len(steps) > 1 else gap / 2
        x, y = (x[0] - margin, *x, x[-1] + margin), (y[0], *y, y[-1])
        colour = GREY if len(names) > 1 or len(set(y)) == 1 else styles[names[0]]["color"]
        axes.step(x, y, where="mid", color=colour, zorder=3, **BOUND)
    if sharing:
        axes.plot([], [], label="bound", color=GREY, **BOUND)


def _places(stages: Sequence[str]) -> dict[str, float]:
    """Where the stages stand on the axis: layers at their numbers, the embedding and the head clear of them."""
    layers = {stage: int(stage.removeprefix(layer_stage(""))) for stage in stages if stage not in (EMBEDDING, HEAD)}
    last = max(layers.values(), default=0)
    gap = max(1.0, 0.07 * last)
    return {EMBEDDING: -gap, **layers, HEAD: last + gap}


def _ticks(places: dict[str, float]) -> tuple[list[float], list[str]]:
    layers = [int(place) for stage, place in places.items() if stage not in (EMBEDDING, HEAD)]
    shown = layers[:: max(1, math.ceil(len(layers) / 16))]
    return [places[EMBEDDING], *shown, places[HEAD]], [EMBEDDING, *map(str, shown), HEAD]


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """The height of what is equal and of what is not finite, below and above all other values."""
    drawn = [x for row in rows for x in (row.judged, row.bound or 0.0) if LOWEST < x < HIGHEST] or [1e-6]
    return min(drawn) / 4, max(drawn) * 4


def _height(row: Row, floor: float, ceiling: float) -> float:
    if not math.isfinite(row.judged):
        return ceiling
    return floor if row.difference.bit_equal == 1 else min(max(row.judged, floor), ceiling)
