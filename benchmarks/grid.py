"""Trainings that differ in one setting each, all evaluated on the same held-out prompts."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.estimates import Estimate
from benchmarks.prediction import predict_held_out, scaled
from benchmarks.tables import table
from trainer.data import read_rollouts
from trainer.train import train

FIGURES_FILE = "figures.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training. axis: what is varied, as `setting`. rollouts: to train on.

    options: of `trainer.train.train` that differ from those of the grid.
    """

    axis: str
    setting: str
    rollouts: Path
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.axis} {self.setting}".replace(" ", "-")


def run_grid(
    runs: Sequence[Run], rollouts: Path, output: Path, gamma: float, base: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row for each run: axis, setting and the figures of `predict_held_out` under `gamma`.

    rollouts: to evaluate on; what their holdout keeps is in nobody's training. base: options of
    all trainings. A run with figures is not trained again, one that was stopped goes on.
    """
    rows = []
    for run in tqdm(runs, desc="runs", file=sys.stderr):
        folder = output / run.name
        path = folder / FIGURES_FILE
        if not path.exists():
            options = {**base, **run.options}
            train(run.rollouts, folder, **options)
            found = predict_held_out(
                folder,
                read_rollouts(rollouts),
                base_model=options["model"],
                gamma=gamma,
                holdout=options["holdout"],
                max_length=options["recipe"].max_length,
                quiet=True,
            )
            figures = {name: asdict(e) for name, e in found[folder.name].items()}
            path.write_text(json.dumps(figures) + "\n")
        row = {"axis": run.axis, "setting": run.setting, "figures": json.loads(path.read_text())}
        rows.append(row)
    return rows


def grid_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; MRE in percent, the squared error in thousandths."""
    lines = []
    for row in rows:
        figures = {name: Estimate(**f) for name, f in row["figures"].items()}
        cells = {f"{n}, %": str(scaled(e, 100)) for n, e in figures.items() if "mre" in n}
        cells |= {"loss / 0.001": str(scaled(figures["loss"], 1000)), "R²": str(figures["r2"])}
        tokens = {"tokens": figures["loss"].n}
        lines.append({"axis": row["axis"], "setting": row["setting"], **cells, **tokens})
    return table(lines)
