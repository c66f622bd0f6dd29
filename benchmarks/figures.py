"""The figures of a run, in its folder; `benchmarks.report` makes tables and pictures of them."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.estimates import Estimate
from benchmarks.provenance import KEY, provenance

FIGURES_FILE = "figures.json"


def write_figures(folder: Path, figures: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    told = {**figures, KEY: provenance()}
    (folder / FIGURES_FILE).write_text(json.dumps(told, default=asdict) + "\n")


def read_figures(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / FIGURES_FILE).read_text(), object_hook=_estimate))


def _estimate(content: dict[str, Any]) -> Any:
    known = {"value", "low", "high", "n"}
    return Estimate(**content) if known <= content.keys() <= known | {"groups"} else content
