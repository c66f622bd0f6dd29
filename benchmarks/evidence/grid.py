"""Trainings that differ in one setting each, all evaluated on the same held-out prompts."""

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.estimates import Estimate
from benchmarks.evidence.prediction import figure_cells, predict_held_out
from trainer.data import read_rollouts
from trainer.training.train import train

FIGURES_FILE = "figures.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training. axis: what is varied, as `setting`. rollouts: to train on.

    options: of `trainer.training.train.train` that differ from those of the grid.
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
            with contextlib.redirect_stdout(sys.stderr):  # of its log
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


def grid_rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row of a table for each run."""
    rows = []
    for run in runs:
        figures = {name: Estimate(**figure) for name, figure in run["figures"].items()}
        rows.append({"axis": run["axis"], "setting": run["setting"], **figure_cells(figures)})
    return rows
