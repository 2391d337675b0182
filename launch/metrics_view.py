"""How sure the model was, shown: text tinted on a terminal, and a picture. Needs rich and matplotlib, an extra."""

import importlib
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sharded_llama.errors import RequestError
from sharded_llama.sampling.entropy import Strategy, TokenMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.color import ColorSystem

FULL_ENTROPY, FULL_VARENTROPY = 6.0, 10.0  # bits and bits^2 that have the full tint
FAINT = 0.05  # of the full tint: below it text is left as it is
# Backgrounds at the corners of the map of both values; between them the colours are mixed.
Colour = tuple[int, int, int]
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
NEITHER, ENTROPY, VARENTROPY, BOTH = WHITE, (255, 170, 60), (110, 190, 255), (120, 60, 160)

FORMATS = ("png", "svg", "pdf")
MAX_TOKENS = 4096  # of one picture
MAX_LABELS, MAX_LABEL = 160, 14  # tokens that are written under the axis, and characters of one
# Colours of Okabe and Ito, which colour-blind people can tell apart, and shapes.
STYLES = {
    Strategy.GREEDY: ("#808080", "o"),
    Strategy.PAUSE: ("#CC79A7", "s"),
    Strategy.EXPLORE: ("#009E73", "^"),
    Strategy.RESAMPLE: ("#D55E00", "D"),
    Strategy.ADAPTIVE: ("#0072B2", "v"),
}


class MetricsPrinter:
    """Writes text as it comes, unchanged, on a terminal with a background that says how sure the model was of it.

    Entropy and varentropy each have a colour, and where both are high a third. A piece of text of several tokens has
    the largest values of them; tokens whose text is yet to come count with the next piece. Where `file` is no
    terminal the text is written as it is, and nothing else.

    Raises RequestError when `file` is a terminal and rich is missing.
    """

    def __init__(self, file: TextIO | None = None):
        self._file = sys.stdout if file is None else file
        self._colours = _colour_system(self._file) if self._file.isatty() else None
        self._entropy, self._varentropy = 0.0, 0.0  # of tokens without text so far

    def write(self, text: str, metrics: Sequence[TokenMetrics] = ()) -> None:
        """Writes a piece of text, with the metrics of its tokens; without any it has no tint."""
        self._entropy = max([self._entropy, *(_finite(m.entropy) for m in metrics)])
        self._varentropy = max([self._varentropy, *(_finite(m.varentropy) for m in metrics)])
        if text:
            self._put(text, tint(self._entropy, self._varentropy))
            self._entropy, self._varentropy = 0.0, 0.0
        self._file.flush()

    def write_plain(self, text: str) -> None:
        """Writes what stands around an answer, without a tint. Tokens whose text never came are forgotten."""
        self._entropy, self._varentropy = 0.0, 0.0
        self.write(text)

    def legend(self) -> None:
        """Writes what the colours mean, a line, where there are colours."""
        if self._colours is None:
            return
        scales = (("entropy", FULL_ENTROPY, 0.0, "bits"), ("varentropy", 0.0, FULL_VARENTROPY, "bits²"))
        for name, entropy, varentropy, unit in scales:
            self._put(f"{name} 0", None)
            for part in (0.2, 0.4, 0.6, 0.8, 1.0):
                self._put("  ", tint(part * entropy, part * varentropy))
            self._put(f" {entropy + varentropy:g} {unit}   ", None)
        self._put(" both ", tint(FULL_ENTROPY, FULL_VARENTROPY))
        self._put("\n", None)

    def _put(self, text: str, background: Colour | None) -> None:
        if self._colours is None or background is None:
            self._file.write(text)
            return
        from rich.color import Color
        from rich.style import Style

        # Dark on light and light on dark: the terminal's own colour of text may be either.
        shown = Color.from_rgb(*background).downgrade(self._colours)
        r, g, b = shown.get_truecolor()
        bright = 0.299 * r + 0.587 * g + 0.114 * b > 128
        style = Style(color=Color.from_rgb(*(BLACK if bright else WHITE)), bgcolor=shown)
        # A background that spans the end of a line colours the rest of the line on some terminals.
        for line in text.splitlines(keepends=True):
            words = line.rstrip("\r\n")
            self._file.write(style.render(words, color_system=self._colours) + line[len(words) :])


def tint(entropy: float, varentropy: float) -> Colour | None:
    """The background (red, green, blue, each to 255) for an entropy in bits and a varentropy in bits^2; None: none."""
    h, v = min(_finite(entropy) / FULL_ENTROPY, 1.0), min(_finite(varentropy) / FULL_VARENTROPY, 1.0)
    if max(h, v) < FAINT:
        return None
    corners = zip(NEITHER, ENTROPY, VARENTROPY, BOTH, strict=True)
    r, g, b = (
        round((1 - h) * (1 - v) * none + h * (1 - v) * first + (1 - h) * v * second + h * v * both)
        for none, first, second, both in corners
    )
    return r, g, b


def check_picture(path: str | os.PathLike[str]) -> Path:
    """Raises RequestError when no picture can be drawn to this file: another ending, no folder, or no matplotlib."""
    path = Path(path)
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise RequestError(f"{path}: a picture's name has to end with {', '.join('.' + x for x in FORMATS)}.")
    if not path.absolute().parent.is_dir():
        raise RequestError(f"{path}: its folder does not exist.")
    if path.is_dir():
        raise RequestError(f"{path} is a folder; name a file.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise RequestError(f"{path}: its folder cannot be written to.")
    _need("matplotlib.figure", f"{path}: pictures")
    return path


def write_picture(path: str | os.PathLike[str], tokens: list[str], metrics: list[TokenMetrics]) -> None:
    """Draws entropy and varentropy along a text, with the strategy of each token, as PNG, SVG or PDF by the ending.

    Args:
      path: a file that is there is replaced at the end.
      tokens: the text of each token.
      metrics: of each token; values that are not finite leave a gap.

    Raises RequestError for another ending, nothing or too much to draw, lists of different lengths, when matplotlib is
    missing, or when the file cannot be written.
    """
    path = check_picture(path)
    if len(tokens) != len(metrics):
        raise RequestError(f"{path}: {len(tokens)} tokens and metrics of {len(metrics)}; each token needs its own.")
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise RequestError(f"{path}: a picture shows 1 to {MAX_TOKENS} tokens, not {len(tokens)}.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labelled = len(tokens) <= MAX_LABELS
    width = max(8.0, 2.0 + 0.2 * len(tokens)) if labelled else 20.0
    figure = Figure(figsize=(width, 7.0), layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    upper, lower = figure.subplots(2, sharex=True)
    _draw(upper, [m.entropy for m in metrics], metrics, "entropy (bits)", labelled)
    _draw(lower, [m.varentropy for m in metrics], metrics, "varentropy (bits$^2$)", labelled)
    if labelled:
        names = [_label(token) for token in tokens]
        lower.set_xticks(range(len(names)), names, rotation=90, fontsize=8, family="monospace", parse_math=False)
    lower.set_xlabel("token (· is a space)" if labelled else "token")
    lower.set_xlim(-0.7, len(tokens) - 0.3)
    handles, names = upper.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), title="how each token was chosen")
    _save(figure, path)


def _draw(axes: "Axes", values: list[float], metrics: list[TokenMetrics], label: str, labelled: bool) -> None:
    """One panel: a mark on a stalk for each token, in the style of its strategy."""
    finite = [x for x in values if math.isfinite(x)]
    for strategy, (colour, marker) in STYLES.items():
        at = [i for i, m in enumerate(metrics) if m.strategy == strategy]
        if at:
            heights = [values[i] if math.isfinite(values[i]) else math.nan for i in at]
            axes.vlines(at, 0, heights, color=colour, linewidth=1.6 if labelled else 0.6, alpha=0.6)
            name = f"{strategy.name.lower()} ({len(at)})"
            size = 26 if labelled else 8
            axes.scatter(at, heights, s=size, color=colour, marker=marker, label=name, clip_on=False, zorder=3)
    axes.set_ylabel(label)
    axes.set_ylim(0, 1.05 * max(1.0, *finite))
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    """Under a temporary name first, so that the file is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # a font has no sign for some text: a box
            figure.savefig(temporary, format=path.suffix.lower().removeprefix("."), dpi=120)
        os.replace(temporary, path)
    except OSError as error:
        raise RequestError(f"{path}: the picture cannot be written: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _label(token: str) -> str:
    """A token in one line: spaces visible, what cannot be printed as its code, and not too long."""
    shown = "".join("·" if c == " " else c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)
    return shown if len(shown) <= MAX_LABEL else shown[: MAX_LABEL - 1] + "…"


def _colour_system(file: TextIO) -> "ColorSystem | None":
    """The colours that a terminal has, as rich names them; None where it has none or the user wants none."""
    _need("rich.console", "tinted text")
    from rich.console import COLOR_SYSTEMS, Console

    console = Console(file=file)
    return None if console.no_color or console.color_system is None else COLOR_SYSTEMS[console.color_system]


def _need(module: str, what: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise RequestError(f"{what} need a package: pip install 'sharded-llama[view]' ({error}).") from error


def _finite(value: float) -> float:
    """The value, 0 in place of what is no number or below it."""
    return max(value, 0.0) if math.isfinite(value) else 0.0
