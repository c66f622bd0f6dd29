"""The figures of a run, in its folder; `benchmarks.report` makes tables and pictures of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIGURES_FILE = "figures.json"


def write_figures(folder: Path, figures: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FIGURES_FILE).write_text(json.dumps(figures) + "\n")


def read_figures(folder: Path) -> dict[str, Any] | None:
    """None where there are none yet."""
    path = folder / FIGURES_FILE
    return dict(json.loads(path.read_text())) if path.exists() else None
