"""log.jsonl, with one of two JSON objects on each line, and loss.png, drawn from it.

    {"step": 7, "loss": nats per token, "grad_norm": before clipping, "tokens_per_s": of this step}
    {"step": 100, "heldout_loss": nats per token, "heldout_bits_per_byte": bits}

Steps count from 1.
"""

import json
import os
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def append(file: Path, **record: Any) -> None:
    """Adds a line to the log."""
    with file.open("a", encoding="utf-8") as f:
        f.write(json.dumps(record) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of the log; one that a killed run left incomplete is left out."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def truncate(file: Path, last_step: int) -> None:
    """Drops what was logged after `last_step`: a resumed run does those steps again."""
    kept = [record for record in read(file) if record["step"] <= last_step]
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, file)


def plot(records: list[dict[str, Any]], file: Path) -> None:
    """Draws training and held-out loss over the steps."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    axes = figure.add_subplot()
    for name, label, style in (("loss", "training", {"linewidth": 1}), ("heldout_loss", "held out", {"marker": "o"})):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
