"""Tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each row under the keys of the first; numbers to the right."""
    if not rows:
        return ""
    names = list(rows[0])
    marks = ["---" if isinstance(rows[0][name], str) else "---:" for name in names]
    lines = [names, marks, *([_cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")
