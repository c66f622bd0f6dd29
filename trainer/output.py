"""What a command prints: Markdown tables, and one line of JSON at the end."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import Parameter

OnlyJson = Annotated[bool, Parameter(name="--json", negative="", help="Print nothing else.")]
NUMBER = re.compile(r"[-+]?\d")  # how one begins, with or without its unit or interval


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each row under the keys of the first; columns of numbers to the right."""
    if not rows:
        return ""
    names = list(rows[0])
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    marks = [_mark([cell for cell in column if cell]) for column in zip(*cells, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [names, marks, *cells])


def _mark(column: Sequence[str]) -> str:
    return "---:" if column and all(map(NUMBER.match, column)) else "---"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def show(text: str, result: Mapping[str, Any], only_json: bool) -> None:
    """`text`, unless only JSON is asked for, and the result, JSON and dataclasses, as a line."""
    if not only_json:
        print(text)
    print(json.dumps(result, default=asdict))
