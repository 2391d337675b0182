"""Rows as plain text: columns under their names, numbers to the right, in four digits."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """The rows as text. `columns`: field -> heading; a field that no row has is left out."""
    used = {field: head for field, head in columns.items() if any(row.get(field) is not None for row in rows)}
    cells = [list(used.values())] + [[shown(row.get(field)) for field in used] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(used))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def shown(value: Any) -> str:
    """A cell: whole numbers whole, others in four digits, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
