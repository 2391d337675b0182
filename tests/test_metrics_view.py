"""Metrics on the terminal and as a picture."""

import builtins
import io
import os
import re

import pytest

from launch.metrics_view import BOTH, ENTROPY, MAX_TOKENS, VARENTROPY, MetricsPrinter, tint, write_picture
from sharded_llama.errors import RequestError
from sharded_llama.sampling.entropy import Strategy, TokenMetrics

TEXTS = ["Once", " upon", "", "\n\n  a\ttime ", "[bold]1[/] :smile: ", "日本" * 60, "a\r\nb\u2028c\x0bd", "end\n"]


def metrics(entropy, varentropy, strategy=Strategy.ADAPTIVE):
    return TokenMetrics(entropy, varentropy, 2.0, 0.5, 0.01, 0.7, strategy, 0.6, 0.9, 27, 0.03, -1.5)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A terminal with all colours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


@pytest.fixture
def without(monkeypatch):
    """A function that makes a package look as if it were not installed."""
    original = builtins.__import__

    def hide(package):
        def importing(name, *args, **kwargs):
            if name.split(".")[0] == package:
                raise ImportError(f"No module named {name!r}")
            return original(name, *args, **kwargs)

        def import_module(name):
            raise ImportError(f"No module named {name!r}")

        monkeypatch.setattr(builtins, "__import__", importing)
        monkeypatch.setattr("importlib.import_module", import_module)

    return hide


def background(colour):
    return "48;2;{};{};{}m".format(*colour)


class TestPrinter:
    def test_text_is_unchanged_where_there_is_no_terminal(self, without):
        """Without rich too."""
        without("rich")
        file = io.StringIO()
        printer = MetricsPrinter(file)
        printer.legend()
        for text in TEXTS:
            printer.write(text, [metrics(5.0, 5.0)])
        assert file.getvalue() == "".join(TEXTS)

    def test_colours_are_all_that_a_terminal_gets_beside_the_text(self, terminal):
        printer = MetricsPrinter(terminal)
        for i, text in enumerate(TEXTS):
            printer.write(text, [metrics(i, 8.0 - i)])
        assert terminal.getvalue().count("\x1b[0m") >= len(TEXTS) - 1
        assert re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()) == "".join(TEXTS)

    def test_every_piece_has_its_own_tint(self, terminal):
        printer = MetricsPrinter(terminal)
        pieces = [("sure", 0.0, 0.0), ("flat", 6.0, 0.0), ("split", 0.0, 10.0), ("lost", 60.0, 100.0)]
        for text, h, v in pieces:
            printer.write(text, [metrics(h, v)])
        sure, flat, split, lost = re.split(r"(?:\x1b\[0m)?\x1b\[38;2;", terminal.getvalue())
        assert sure == "sure"
        assert flat == f"0;0;0;{background(ENTROPY)}flat"
        assert split == f"0;0;0;{background(VARENTROPY)}split"
        assert lost == f"255;255;255;{background(BOTH)}lost\x1b[0m"

    def test_a_piece_has_the_largest_values_of_its_tokens(self, terminal):
        """Also of those before it whose text was not there yet, and of none before that."""
        printer = MetricsPrinter(terminal)
        printer.write("a", [metrics(6.0, 10.0)])
        printer.write("", [metrics(6.0, 0.0)])
        printer.write("b", [metrics(1.0, 0.0), metrics(2.0, 0.0)])
        printer.write("c", [metrics(0.0, 1.0), metrics(0.0, 10.0), metrics(0.0, 2.0)])
        printer.write("d")
        written = terminal.getvalue()
        assert f"{background(BOTH)}a" in written
        assert f"{background(ENTROPY)}b" in written
        assert f"{background(VARENTROPY)}c" in written
        assert written.endswith("\x1b[0md")

    def test_what_stands_around_answers_has_no_tint(self, terminal):
        """Nor does it take that of a token without text, such as an end of sequence; nothing else does after it."""
        printer = MetricsPrinter(terminal)
        printer.write("", [metrics(6.0, 10.0)])
        printer.write_plain("--- answer 2 ---\n")
        printer.write("sure", [metrics(0.0, 0.0)])
        assert terminal.getvalue() == "--- answer 2 ---\nsure"

    def test_text_can_be_read_where_there_are_few_colours(self, terminal, monkeypatch):
        """The colour of text goes with the background that is shown, not with the one that was meant."""
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("COLORTERM")
        printer = MetricsPrinter(terminal)
        grid = [(h, v) for h in range(7) for v in range(0, 11, 2) if (h, v) != (0, 0)]
        for h, v in grid:
            printer.write("x", [metrics(h, v)])
        colours = re.findall(r"\x1b\[(\d+);(\d+)m", terminal.getvalue())
        assert len(colours) == len(grid)
        dark, light = {"40", "41", "44", "45", "100", "101", "104"}, {"47", "102", "103", "106", "107"}
        for text, background in colours:
            assert background in (dark if text == "97" else light)

    def test_legend(self, terminal):
        MetricsPrinter(terminal).legend()
        written = terminal.getvalue()
        assert all(background(colour) in written for colour in (ENTROPY, VARENTROPY, BOTH))
        line = re.sub(r"\x1b\[[0-9;]*m", "", written)
        assert re.fullmatch(r"entropy 0 +6 bits +varentropy 0 +10 bits² +both \n", line)

    def test_users_who_want_no_colour_get_none(self, terminal, monkeypatch):
        monkeypatch.setenv("NO_COLOR", "1")
        printer = MetricsPrinter(terminal)
        printer.legend()
        printer.write("text", [metrics(6.0, 10.0)])
        assert terminal.getvalue() == "text"

    def test_rich_is_asked_for_by_name(self, terminal, without):
        without("rich")
        with pytest.raises(RequestError, match=r"tinted text .*pip install 'sharded-llama\[view\]'"):
            MetricsPrinter(terminal)


def test_tint():
    """None for what is sure; the corners; halfway; what is no number counts as 0."""
    assert tint(0.0, 0.0) is None
    assert tint(0.2, 0.4) is None
    assert (tint(6.0, 0.0), tint(0.0, 10.0), tint(7.0, 99.0)) == (ENTROPY, VARENTROPY, BOTH)
    assert tint(3.0, 0.0) == tuple(round((255 + x) / 2) for x in ENTROPY)
    assert tint(float("nan"), 10.0) == VARENTROPY
    assert tint(float("inf"), -1.0) is None


class TestPicture:
    TOKENS = ("Once", " upon", "\n", "$x^2$ \\frac{", "\x1b[0m", "日本", "a" * 100)

    def drawn(self, monkeypatch, path, tokens, values):
        """The figure that was written to the file."""
        from matplotlib.figure import Figure

        figures = []
        save = Figure.savefig
        monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
        write_picture(path, list(tokens), values)
        return figures[0]

    def test_what_is_drawn(self, monkeypatch, tmp_path):
        values = [metrics(float(i), 10.0 * i, i % 5) for i in range(len(self.TOKENS))]
        figure = self.drawn(monkeypatch, tmp_path / "text.png", self.TOKENS, values)
        upper, lower = figure.axes
        assert upper.get_ylabel() == "entropy (bits)"
        assert lower.get_ylabel() == "varentropy (bits$^2$)"
        for axes, name in ((upper, "entropy"), (lower, "varentropy")):
            marks = {m.get_label(): m.get_offsets().tolist() for m in axes.collections if "(" in str(m.get_label())}
            assert set(marks) == {"greedy (2)", "pause (2)", "explore (1)", "resample (1)", "adaptive (1)"}
            points = [[i, getattr(m, name)] for i, m in enumerate(values)]
            assert marks["pause (2)"] == [points[1], points[6]]
            assert sorted(point for group in marks.values() for point in group) == points
            assert axes.get_ylim()[1] > max(y for _, y in points)
        labels = [label.get_text() for label in lower.get_xticklabels()]
        assert labels[:3] == ["Once", "·upon", "\\n"]
        assert labels[4] == "\\x1b[0m"
        assert all(len(label) <= 14 for label in labels)
        shown = [text.get_text() for text in figure.legends[0].get_texts()]
        assert shown == ["greedy (2)", "pause (2)", "explore (1)", "resample (1)", "adaptive (1)"]

    def test_long_texts_and_values_that_are_not_finite(self, monkeypatch, tmp_path):
        values = [metrics(float("nan"), float("inf")), *[metrics(0.0, 0.0)] * 999]
        figure = self.drawn(monkeypatch, tmp_path / "long.png", ["a"] * 1000, values)
        assert figure.axes[0].get_ylim() == (0, 1.05)
        assert not any(label.get_text() == "a" for label in figure.axes[1].get_xticklabels())

    @pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
    def test_formats(self, tmp_path, ending, begins):
        path = tmp_path / f"picture.{ending}"
        path.write_text("what was there before")
        write_picture(path, ["a"], [metrics(1.0, 1.0)])
        assert path.read_bytes().startswith(begins)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]

    def test_a_file_that_fails_is_not_touched(self, monkeypatch, tmp_path):
        from matplotlib.figure import Figure

        def fail(self, file, **_):
            file.write_text("half")
            raise OSError("no space left")

        monkeypatch.setattr(Figure, "savefig", fail)
        path = tmp_path / "picture.png"
        path.write_text("before")
        with pytest.raises(RequestError, match=r"picture\.png: the picture cannot be written: no space left"):
            write_picture(path, ["a"], [metrics(1.0, 1.0)])
        assert path.read_text() == "before"
        assert [p.name for p in tmp_path.iterdir()] == [path.name]

    @pytest.mark.parametrize(
        ("name", "n_tokens", "n_metrics", "message"),
        [
            ("a.gif", 1, 1, r"a\.gif: a picture's name has to end with \.png, \.svg, \.pdf"),
            ("none/a.png", 1, 1, "its folder does not exist"),
            ("folder.png", 1, 1, "is a folder"),
            ("closed/a.png", 1, 1, "its folder cannot be written to"),
            ("a.png", 0, 0, f"1 to {MAX_TOKENS} tokens, not 0"),
            ("a.png", 2, 1, "2 tokens and metrics of 1"),
            ("a.png", MAX_TOKENS + 1, MAX_TOKENS + 1, f"1 to {MAX_TOKENS} tokens, not {MAX_TOKENS + 1}"),
        ],
    )
    def test_what_cannot_be_drawn(self, tmp_path, monkeypatch, name, n_tokens, n_metrics, message):
        (tmp_path / "folder.png").mkdir()
        (tmp_path / "closed").mkdir()
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "closed" and access(path, mode))
        with pytest.raises(RequestError, match=message):
            write_picture(tmp_path / name, ["a"] * n_tokens, [metrics(1.0, 1.0)] * n_metrics)

    def test_matplotlib_is_asked_for_by_name(self, tmp_path, without):
        without("matplotlib")
        with pytest.raises(RequestError, match=r"a\.png: pictures need a package: pip install 'sharded-llama\[view\]'"):
            write_picture(tmp_path / "a.png", ["a"], [metrics(1.0, 1.0)])
