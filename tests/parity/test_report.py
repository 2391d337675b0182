"""What a comparison looks like: every number and verdict in the text, strict JSON, and pictures that open."""

import dataclasses
import json
import math
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from sharded_llama.errors import ParityError
from sharded_llama.parity import report as report_module
from sharded_llama.parity.components import EMBEDDING, EMBEDDING_AXES, HEAD, HEAD_AXES, LAYER_AXES, layer_stage
from sharded_llama.parity.plot import plot
from sharded_llama.parity.report import to_json, to_text, write_json_report
from sharded_llama.parity.results import (
    CUMULATIVE,
    ISOLATED,
    Difference,
    GreedyRow,
    LogitsRow,
    Report,
    Row,
    Worst,
)

ADDED_AXES = {"layer": "BLD", "k_cache": "BLGK", "v_cache": "BLGK", "cached_attn": "BLHK"}  # in the isolated mode only
SETTINGS = {"checkpoint": "/models/llama", "reference": "made up 1.0", "dtype": "float32", "tokens": "2 rows of 9"}


def difference(relative: float, axes: str, bit_equal: float = 0.75, max_abs: float | None = None) -> Difference:
    if relative == 0:
        return Difference(0.0, 0.0, 1.0, None)
    worst = Worst(tuple(range(len(axes))), 1.25, 1.5)
    return Difference(2 * relative if max_abs is None else max_abs, relative, bit_equal, worst)


def row(mode: str, stage: str, component: str, axes: str, relative: float = 2e-7, **changes: Any) -> Row:
    """A row that passes."""
    noise = 3e-7 if mode == CUMULATIVE else None
    bound = 1e-6 if mode == ISOLATED else 1e-5
    made = Row(mode, stage, component, axes, difference(relative, axes), noise, relative, bound)
    return dataclasses.replace(made, **changes)


def rows(n_layers: int) -> list[Row]:
    """Every component of both modes; v is equal bit for bit, errors grow from layer to layer."""
    made = []
    for i in range(-1, n_layers + 1):
        stage = EMBEDDING if i < 0 else HEAD if i == n_layers else layer_stage(i)
        axes = EMBEDDING_AXES if i < 0 else HEAD_AXES if i == n_layers else LAYER_AXES
        for mode in (ISOLATED, CUMULATIVE):
            added = ADDED_AXES if mode == ISOLATED and axes is LAYER_AXES else {}
            for component, letters in {**axes, **added}.items():
                error = 0.0 if component in ("v", "k_cache") else (i + 2) * 1e-9 if mode == CUMULATIVE else 2e-7
                made.append(row(mode, stage, component, letters, error))
    return made


def logits_row(way: str, **changes: Any) -> LogitsRow:
    made = LogitsRow(way, difference(4e-6, "BLV"), 4e-6, 1e-5, True, 1.5e-9, 2.5e-8, 1.0, 0.98765)
    return dataclasses.replace(made, **changes)


def report(n_layers: int = 2, change: dict[tuple[str, str, str], dict[str, Any]] | None = None, **more: Any) -> Report:
    """A report that passes, with changes of rows by (mode, stage, component)."""
    change = change or {}
    changed = tuple(dataclasses.replace(r, **change.pop((r.mode, r.stage, r.component), {})) for r in rows(n_layers))
    assert not change, "there are no such rows"
    fields = {
        "settings": SETTINGS,
        "rows": changed,
        "logits": tuple(map(logits_row, ("one piece", "chunks of 8", "token by token"))),
        "greedy": tuple(GreedyRow(i, 16, None, None, None, None, 1e-3) for i in range(3)),
    }
    return Report(**fields | more)


def cells(text: str, title: str, first: str) -> dict[str, str]:
    """The cells of the line that begins with `first`, by column, of the table under `title`."""
    lines = text[text.index(title) :].split("\n")[1:]
    names = re.split(r" {2,}", lines[0].strip())
    line = next(line for line in lines if line.split()[:1] == first.split()[:1] and line.strip().startswith(first))
    ends = [lines[0].index(name) + len(name) for name in names]
    words: dict[str, str] = {}
    for match in re.finditer(r"\S+(?: \S+)*", line):
        # Numbers end where their column does, text begins there.
        name = next(n for n, e in zip(names, ends, strict=True) if match.end() == e or match.start() == e - len(n))
        words[name] = match.group()
    return words


def last_lines(text: str) -> str:
    """The verdict, on one line."""
    return text.split("\n\n")[-1].replace("\n", " ")


# --- text


def test_says_first_what_was_compared():
    lines = to_text(report()).split("\n")
    assert lines[:5] == [
        "checkpoint: /models/llama",
        "reference:  made up 1.0",
        "dtype:      float32",
        "tokens:     2 rows of 9",
        "",
    ]


def test_a_line_per_component_in_the_order_of_computation():
    text = to_text(report(n_layers=3))
    isolated, cumulative = text[text.index("Isolated") : text.index("Cumulative")], text[text.index("Cumulative") :]
    order = [line.split()[0] for line in isolated.split("\n")[2:] if line.strip()]
    assert order == ["embedding", *LAYER_AXES, *ADDED_AXES, "norm", "logits"]
    order = [line.split()[0] for line in cumulative.split("\n\n")[0].split("\n")[2:] if line.strip()]
    assert order[: len(LAYER_AXES) + 3] == ["embedding", *LAYER_AXES, "norm", "logits"]
    assert "the worst of 3 layers" in isolated
    assert "the worst of 3 layers" in cumulative


def test_a_line_sums_up_the_layers():
    change = {
        (ISOLATED, "layers.1", "q"): {"difference": difference(9e-7, "BLHK", 0.25, 5e-3), "judged": 9e-7},
        (ISOLATED, "layers.2", "q"): {"difference": difference(3e-7, "BLHK", 0.5, 7e-3), "judged": 3e-7},
    }
    line = cells(to_text(report(4, change)), "Isolated", "q ")
    assert line == {
        "component": "q",
        "relative": "9.00e-07",
        "worst in": "layers.1",
        "max abs": "7.00e-03",  # of any layer
        "bit-equal": "56.25%",  # (3/4 + 1/4 + 2/4 + 3/4) / 4
        "bound": "1.00e-06",
        "verdict": "ok",
    }


def test_the_worst_is_nearest_to_its_own_bound():
    change = {
        (ISOLATED, "layers.0", "q"): {"difference": difference(8e-7, "BLHK"), "judged": 8e-7, "bound": 1e-3},
        (ISOLATED, "layers.1", "q"): {"difference": difference(2e-7, "BLHK"), "judged": 2e-7, "bound": 1e-7},
    }
    line = cells(to_text(report(3, change)), "Isolated", "q ")
    assert (line["relative"], line["worst in"]) == ("8.00e-07", "layers.1")
    assert (line["judged"], line["bound"], line["verdict"]) == ("2.00e-07", "1.00e-07", "FAIL")


def test_growth_with_depth_and_the_noise_of_the_reference():
    text = to_text(report(5))
    line = cells(text, "Cumulative", "attn_wo")
    assert (line["first"], line["last"], line["relative"]) == ("2.00e-09", "6.00e-09", "6.00e-09")
    assert (line["worst in"], line["noise"], line["bound"]) == ("layers.4", "3.00e-07", "1.00e-05")
    line = cells(text, "Cumulative", "logits")
    assert (line["relative"], line["noise"]) == ("7.00e-09", "3.00e-07")
    assert "first" not in line
    assert "noise: relative error of the reference itself" in text
    assert "noise" not in text[text.index("Isolated") : text.index("Cumulative")]


def test_a_line_per_stage_and_component():
    made = report(3, {(CUMULATIVE, "layers.2", "up"): {"noise": 7e-7}})
    text = to_text(made, every_layer=True)
    cumulative = text[text.index("Cumulative") : text.index("Logits")].split("\n")
    listed = [tuple(line.split()[:2]) for line in cumulative[2:] if line.startswith("  ")]
    assert [(r.stage, r.component) for r in made.rows if r.mode == CUMULATIVE] == listed[:-1]  # the last explains noise
    line = next(line for line in cumulative if line.split()[:2] == ["layers.2", "up"])
    assert line.split()[2:] == ["7.00e-07", "4.00e-09", "8.00e-09", "75.00%", "1.00e-05", "ok"]
    assert "worst of" not in text


def test_half_precision_shows_what_is_judged():
    change = {(ISOLATED, "layers.0", "q"): {"judged": 8e-7}}
    text = to_text(report(1, change))
    line = cells(text, "Isolated", "q ")
    assert (line["relative"], line["judged"], line["bound"]) == ("2.00e-07", "8.00e-07", "1.00e-06")
    assert cells(text, "Isolated", "k ")["judged"] == "2.00e-07"
    assert "judged: what the bound is for" in text
    assert "judged" not in to_text(report(1))


def test_without_bounds_there_is_no_verdict():
    made = report(2)
    text = to_text(dataclasses.replace(made, rows=tuple(dataclasses.replace(r, bound=None) for r in made.rows)))
    line = cells(text, "Isolated", "attn_wo")
    assert line["verdict"] == "-"
    assert "bound" not in line
    assert last_lines(text).startswith("PASS: ")


def test_passes_with_counts():
    made = report(2)
    n, equal = len(made.rows), 2 * 2 + 2  # v in both modes, k_cache in one, of two layers
    assert n == 2 * (3 + 2 * 16) + 2 * 4
    assert last_lines(to_text(made)) == (
        f"PASS: {n} components compared, {equal} of them equal bit for bit; 3 ways to the logits; 3 greedy rows."
    )
    assert "FAIL" not in to_text(made)


def test_equal_values_and_shares():
    change = {
        (ISOLATED, "layers.0", "k"): {"difference": difference(1e-9, "BLGK", 0.9999999)},
        (ISOLATED, "layers.0", "up"): {"difference": difference(1e-9, "BLF", 1e-9)},
    }
    text = to_text(report(1, change))
    assert cells(text, "Isolated", "v ") | {"bound": ""} == {
        "component": "v",
        "relative": "0",
        "worst in": "layers.0",
        "max abs": "0",
        "bit-equal": "100%",
        "judged": "0",
        "bound": "",
        "verdict": "ok",
    }
    assert cells(text, "Isolated", "k ")["bit-equal"] == "99.99%"  # not all of them
    assert cells(text, "Isolated", "up")["bit-equal"] == "0.00%"


def test_a_failure_names_the_first_component_and_its_worst_value():
    bad = {"difference": Difference(0.25, 1e-3, 0.5, Worst((0, 5, 2, 7), 1.25, 1.5)), "judged": 1e-3}
    change = {
        (ISOLATED, "layers.1", "q"): bad,
        (CUMULATIVE, "layers.0", "attn"): bad,
        (ISOLATED, "layers.1", "k_rotated"): bad,
    }
    made = report(2, change)
    text = to_text(made)
    assert made.first_failure.component == "q"
    assert last_lines(text) == (
        "FAIL: isolated, layers.1, q: the relative distance 1.00e-03 is beyond the bound 1.00e-06. The worst value "
        "is at row 0, token 5, head 2, channel 7: ours 1.25, the reference's 1.5. "
        f"Failed: 3 of {len(made.rows)} components, 0 of 3 ways to the logits, 0 of 3 greedy rows."
    )
    assert cells(text, "Isolated", "q ")["verdict"] == "FAIL"
    assert cells(text, "Isolated", "k ")["verdict"] == "ok"
    assert cells(text, "Cumulative", "attn ")["verdict"] == "FAIL"
    assert "PASS" not in text


def test_positions_of_every_kind_in_words():
    words = {
        ("layers.0", "attn_weights"): "row 0, head 1, token 2, attended token 3",
        ("layers.0", "k"): "row 0, token 1, kv head 2, channel 3",
        ("layers.0", "up"): "row 0, token 1, channel 2",
        ("head", "logits"): "row 0, token 1, token id 2",
    }
    for (stage, component), position in words.items():
        text = to_text(report(1, {(ISOLATED, stage, component): {"judged": 1.0}}))
        assert f"FAIL: isolated, {stage}, {component}: " in text
        assert f"The worst value is at {position}: ours 1.25" in last_lines(text)


@pytest.mark.parametrize("bound", [1e-6, None])
def test_values_that_are_not_finite_fail(bound: float | None):
    bad = Difference(math.nan, math.nan, 0.5, Worst((0, 1, 2, 3), math.nan, 1.5))
    change = {(ISOLATED, "layers.1", "attn"): {"difference": bad, "judged": math.nan, "bound": bound}}
    text = to_text(report(3, change))
    line = cells(text, "Isolated", "attn ")
    assert (line["relative"], line["max abs"], line["worst in"], line["verdict"]) == ("nan", "nan", "layers.1", "FAIL")
    assert line.get("bound", "") == ("1.00e-06" if bound else "")
    assert "judged" not in line
    assert last_lines(text).startswith(
        "FAIL: isolated, layers.1, attn: the relative distance is nan: there are values that are not finite. The "
        "worst value is at row 0, token 1, head 2, channel 3: ours nan, the reference's 1.5."
    )


def test_an_infinite_distance():
    bad = Difference(1.0, math.inf, 0.0, Worst((0, 0, 0), 1.0, 0.0))
    text = to_text(report(1, {(CUMULATIVE, "embedding", "embedding"): {"difference": bad, "judged": math.inf}}))
    assert cells(text, "Cumulative", "embedding")["relative"] == "inf"
    assert "the relative distance inf is beyond the bound 1.00e-05" in text


def test_the_ways_to_the_logits():
    ways = (
        logits_row("one piece"),
        logits_row("chunks of 8", difference=difference(2e-4, "BLV", max_abs=0.125), judged=2e-4, top1=0.5),
        logits_row("token by token", close=False, bound=None, kl_max=math.nan),
    )
    text = to_text(report(1, logits=ways))
    assert cells(text, "Logits", "one piece") == {
        "way": "one piece",
        "relative": "4.00e-06",
        "max abs": "8.00e-06",
        "KL mean": "1.50e-09",
        "KL max": "2.50e-08",
        "top-1": "100%",
        "top-5": "98.76%",
        "bound": "1.00e-05",
        "verdict": "ok",
    }
    line = cells(text, "Logits", "chunks of 8")
    assert (line["relative"], line["max abs"], line["top-1"], line["verdict"]) == (
        "2.00e-04",
        "1.25e-01",
        "50.00%",
        "FAIL",
    )
    line = cells(text, "Logits", "token by token")
    assert (line["KL max"], line["verdict"]) == ("nan", "FAIL")
    assert "  token by token: some values are beyond rtol 0.001, atol 0.01" in text
    assert last_lines(text) == (
        "FAIL: logits, chunks of 8: the relative distance 2.00e-04 is beyond the bound 1.00e-05. The worst value is at "
        "row 0, token 1, token id 2: ours 1.25, the reference's 1.5. "
        f"Failed: 0 of {len(rows(1))} components, 2 of 3 ways to the logits, 0 of 3 greedy rows."
    )
    only = to_text(report(1, logits=ways[2:]))
    assert "FAIL: logits, token by token: some values are beyond rtol 0.001, atol 0.01. The worst" in only
    assert "judged" not in text
    judged = to_text(report(1, logits=(logits_row("one piece", judged=5e-6),)))
    assert cells(judged, "Logits", "one piece")["judged"] == "5.00e-06"


def test_greedy_rows():
    equal = GreedyRow(0, 16, None, None, None, None, 1e-3)
    undecided = GreedyRow(1, 16, 5, 17, 42, 1e-4, 1e-3)
    unknown = GreedyRow(2, 16, 0, 18, 43, 2e-4, None)
    wrong = GreedyRow(3, 16, 9, 19, 44, 0.5, 1e-3)
    text = to_text(report(1))
    assert "Greedy continuation by 16 tokens: 3 of 3 rows are equal\n\nPASS" in text
    text = to_text(report(1, greedy=(equal, undecided, unknown)))
    assert "1 of 3 rows are equal" in text
    lines = [line.split() for line in text[text.index("Greedy") :].split("\n")[2:4]]
    assert lines == [
        ["1", "5", "17", "42", "1.00e-04", "0", "1.00e-03", "ok", "(undecided:", "margin", "within", "noise)"],
        ["2", "0", "18", "43", "2.00e-04", "0", "-"],
    ]
    assert last_lines(text).startswith("PASS")
    text = to_text(report(1, greedy=(equal, undecided, wrong)))
    assert cells(text, "Greedy", "3 ")["verdict"] == "FAIL"
    assert last_lines(text).startswith(
        "FAIL: greedy, row 3, step 9: ours is token 19, the reference's 44. Its margin is 5.00e-01, ours 0: beyond the "
        "noise of 1.00e-03. Failed: "
    )


def test_only_what_there_is():
    isolated = tuple(r for r in rows(2) if r.mode == ISOLATED)
    text = to_text(Report({}, isolated, (), ()))
    assert text.startswith("Isolated")
    assert not re.search("Cumulative|Logits|Greedy", text)
    assert last_lines(text) == f"PASS: {len(isolated)} components compared, 4 of them equal bit for bit."
    assert "component compared" in to_text(Report({}, isolated[:1], (), ()))


@pytest.mark.parametrize("every_layer", [False, True])
@pytest.mark.parametrize("n_layers", [1, 126, 1200])
def test_lines_are_at_most_120_columns(n_layers: int, every_layer: bool):
    made = report(n_layers)
    change = {"judged": 3e-7, "component": "a_component_with_a_name_that_is_long", "noise": 1e-7}
    many = (*made.rows, dataclasses.replace(made.rows[-3], **change), dataclasses.replace(made.rows[-2], **change))
    long = {"checkpoint": "/models/" + "x" * 300, "prompt": "word " * 90, "a name " * 30: "y" * 130}
    greedy = tuple(GreedyRow(10_000 + i, 4096, 1000, 128_000, 128_255, 1e-4, 1e-3) for i in range(2))
    ways = (logits_row("chunks of 100000 tokens", judged=1e-7),)
    text = to_text(Report(long, many, ways, greedy), every_layer=every_layer)
    assert max(map(len, text.split("\n"))) <= 120
    assert not re.search(r"[ \t]$", text, re.MULTILINE)
    assert "x" * 70 in text
    assert f"layers.{n_layers - 1}" in text
    assert "a_component..." in text


def test_text_from_outside_stays_on_its_line():
    text = to_text(report(1, settings={"made\nby": "a\x1b[31m\nb\ud800\tc \u00fc"}))
    assert text.split("\n")[0] == "made by: a?[31m b? c \u00fc"
    text.encode()


# --- JSON


def test_json_has_every_number():
    bad = Difference(math.nan, math.inf, 0.5, Worst((0, 1, 2), -math.inf, np.float32(1.5)))
    change = {(CUMULATIVE, "embedding", "embedding"): {"difference": bad, "judged": math.nan, "bound": None}}
    greedy = (GreedyRow(0, 4, 1, np.int32(2), 3, np.float64(0.25), None),)
    settings = {"mesh": "data:1", "rows": np.int64(3), "shape": (2, 3), "scale": math.nan, "nested": {"a": [math.inf]}}
    made = report(1, change, settings=settings, greedy=greedy)
    again = json.loads(json.dumps(to_json(made), allow_nan=False))
    assert again["passed"] is False
    assert again["settings"] == {
        "mesh": "data:1",
        "rows": 3,
        "shape": [2, 3],
        "scale": None,
        "nested": {"a": [None]},
    }
    broken = {
        "mode": "cumulative",
        "stage": "embedding",
        "component": "embedding",
        "axes": "BLD",
        "difference": {
            "max_abs": None,
            "relative": None,
            "bit_equal": 0.5,
            "worst": {"position": [0, 1, 2], "ours": None, "theirs": 1.5},
        },
        "noise": 3e-7,
        "judged": None,
        "bound": None,
        "passed": False,
    }
    assert again["first_failure"] == again["rows"][1] == broken
    assert len(again["rows"]) == len(made.rows)
    for entry, one in zip(again["rows"][2:], made.rows[2:], strict=True):
        assert (entry["mode"], entry["stage"], entry["component"]) == (one.mode, one.stage, one.component)
        assert (entry["judged"], entry["bound"], entry["noise"]) == (one.judged, one.bound, one.noise)
        assert (entry["difference"]["relative"], entry["passed"]) == (one.difference.relative, True)
        assert (entry["difference"]["worst"] is None) == (one.component in ("v", "k_cache"))
    assert again["logits"][1] == {
        "way": "chunks of 8",
        "difference": {
            "max_abs": 8e-6,
            "relative": 4e-6,
            "bit_equal": 0.75,
            "worst": {"position": [0, 1, 2], "ours": 1.25, "theirs": 1.5},
        },
        "judged": 4e-6,
        "bound": 1e-5,
        "close": True,
        "kl_mean": 1.5e-9,
        "kl_max": 2.5e-8,
        "top1": 1.0,
        "top5": 0.98765,
        "passed": True,
    }
    assert again["greedy"] == [
        {
            "row": 0,
            "length": 4,
            "first_difference": 1,
            "ours": 2,
            "theirs": 3,
            "margin": 0.25,
            "noise": None,
            "own_margin": 0.0,
            "passed": True,
        }
    ]


def test_json_of_a_report_that_passes():
    again = to_json(report(1))
    assert (again["passed"], again["first_failure"]) == (True, None)


def test_the_file_of_json(tmp_path: Path):
    (tmp_path / "r.json").write_text("the old one")
    write_json_report(report(2), tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(to_json(report(2))))
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_file_of_json_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ParityError, match=r"absent/r\.json: cannot be written: No such file or directory"):
        write_json_report(report(1), tmp_path / "absent" / "r.json")
    (tmp_path / "r.json").write_text("the old one")

    def half_written(file: Path, content: dict) -> None:
        file.write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_module, "write_json", half_written)
    with pytest.raises(ParityError, match=r"r\.json: cannot be written: No space left on device"):
        write_json_report(report(1), tmp_path / "r.json")
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert (tmp_path / "r.json").read_text() == "the old one"


# --- pictures


def drawn(made: Report, file: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The figure that `plot` saves."""
    figures = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), real(self, *args, **kw)))
    plot(made, file)
    return figures[0]


@pytest.mark.parametrize("n_layers", [1, 126])
def test_a_png_that_opens(tmp_path: Path, n_layers: int):
    plot(report(n_layers), tmp_path / "p.png")
    data = (tmp_path / "p.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (12 * 120, round(10.4 * 120))
    assert len(data) > 20_000
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


@pytest.mark.parametrize(("ending", "beginning"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("PNG", b"\x89PNG")])
def test_other_formats(tmp_path: Path, ending: str, beginning: bytes):
    (tmp_path / f"p.{ending}").write_bytes(b"the old one")
    plot(report(2), tmp_path / f"p.{ending}")
    assert (tmp_path / f"p.{ending}").read_bytes().startswith(beginning)


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bad = Difference(1.0, math.nan, 0.0, Worst((0, 0, 0), math.nan, 1.0))
    change = {
        (ISOLATED, "layers.1", "up"): {"judged": 5e-6},
        (CUMULATIVE, "layers.2", "down"): {"difference": bad, "judged": math.nan},
        (CUMULATIVE, "layers.0", "gate"): {"bound": 2e-5},
    }
    isolated, cumulative = drawn(report(3, change), tmp_path / "p.svg", monkeypatch).axes

    def points(axes: Any, label: str) -> list[tuple[float, Any]]:
        line = next(line for line in axes.get_lines() if line.get_label() == label)
        x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
        return [(a, pytest.approx(b, rel=1e-12)) for a, b in zip(x, y, strict=True) if not math.isnan(b)]

    assert (isolated.get_yscale(), cumulative.get_yscale()) == ("log", "log")
    floor = 2e-7 / 4
    assert points(isolated, "q") == [(0, 2e-7), (1, 2e-7), (2, 2e-7)]
    assert points(isolated, "_v") == [(0, floor), (1, floor), (2, floor)]  # not connected
    assert points(isolated, "v") == points(isolated, "_q") == []
    assert points(isolated, "embedding") == [(-1, 2e-7)]
    assert points(isolated, "logits") == [(3, 2e-7)]
    assert points(cumulative, "q") == [(0, 2e-9), (1, 3e-9), (2, 4e-9)]
    assert points(isolated, "failed") == [(1, 5e-6)]
    assert points(cumulative, "failed") == [(2, 4 * 2e-5)]
    assert points(cumulative, "down")[2:] == [(2, 4 * 2e-5)]
    for axes, texts in ((isolated, ["bit-equal"]), (cumulative, ["bit-equal", "not finite"])):
        assert [text.get_text() for text in axes.texts] == texts
        assert [text.get_text() for text in axes.get_xticklabels()] == ["embedding", "0", "1", "2", "head"]
    steps = [list(line.get_ydata()) for line in cumulative.get_lines() if line.get_drawstyle() == "steps-mid"]
    assert sorted(steps) == [[1e-5] * 3] * 2 + [[1e-5] * 5, [2e-5, 2e-5, 1e-5, 1e-5, 1e-5]]
    labels = [text.get_text() for text in isolated.figure.legends[0].get_texts()]
    assert labels == ["embedding", *LAYER_AXES, *ADDED_AXES, "norm", "logits", "bound", "failed"]
    styles = {
        (line.get_color(), str(line.get_linestyle()), line.get_marker())
        for line in isolated.get_lines()
        if line.get_label() in LAYER_AXES | ADDED_AXES
    }
    assert len(styles) == 20


def test_one_mode_has_one_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = Report({}, tuple(r for r in rows(2) if r.mode == CUMULATIVE and r.stage == "layers.1"), (), ())
    (axes,) = drawn(made, tmp_path / "p.png", monkeypatch).axes
    assert axes.get_title().startswith("Cumulative")


@pytest.mark.parametrize("error", [0.0, math.nan, math.inf, 5e-324, 1e308])
def test_errors_that_have_no_logarithm_or_nearly(tmp_path: Path, error: float):
    made = tuple(dataclasses.replace(r, judged=error, bound=0.0 if error else None) for r in rows(2))
    plot(Report({}, made, (), ()), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["p.jpg", "p", "p.png.txt", ".png"])
def test_pictures_of_another_ending(tmp_path: Path, name: str):
    with pytest.raises(ParityError, match=rf"{name}: a picture's name has to end with \.png, \.svg, \.pdf"):
        plot(report(1), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_pictures_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ParityError, match=r"p\.png: the comparison has no components to draw"):
        plot(report(1, rows=()), tmp_path / "p.png")
    with pytest.raises(ParityError, match=r"absent/p\.png: cannot be written: No such file or directory"):
        plot(report(1), tmp_path / "absent" / "p.png")
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda *args, **kw: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            plot(report(1), tmp_path / "p.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ParityError, match=r"p\.png: .*pip install 'sharded_llama\[parity\]'.*matplotlib"):
        plot(report(1), tmp_path / "p.png")
    assert not list(tmp_path.iterdir())
