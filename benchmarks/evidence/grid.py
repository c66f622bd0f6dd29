"""Trainings that differ in one setting each, all evaluated on the same held-out prompts."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cyclopts import Parameter
from tqdm import tqdm

from benchmarks.evidence import positions
from benchmarks.evidence.prediction import POSITIONS, columns, intervals
from benchmarks.evidence.small import SmallTraining
from benchmarks.figures import FIGURES_FILE, read_figures, write_figures
from benchmarks.provenance import end
from trainer.data import finished_lengths
from trainer.evaluation.figures import length_errors
from trainer.evaluation.predictors import predictors
from trainer.output import OnlyJson, table
from trainer.reading import Reading
from trainer.resume import keep_settings
from trainer.training.train import train
from value_server.contract.checkpoint import read_config


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training. axis: what is varied, as `setting`. rollouts: to train on."""

    axis: str
    setting: str
    rollouts: Path
    training: SmallTraining

    @property
    def name(self) -> str:
        return f"{self.axis} {self.setting}".replace(" ", "-")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Grid:
    """What all runs have in common. What `training` holds out is in nobody's training."""

    rollouts: Path
    """Parquet file or folder of shards, several completions a prompt."""
    training: SmallTraining
    only_json: OnlyJson = False

    def lengths(self) -> list[int]:
        """Of the finished completions to train on."""
        return finished_lengths(self.training.parts(self.rollouts)[0])

    def run(self, runs: Sequence[Run], gamma: float, output: Path, **facts: Any) -> None:
        """Train and evaluate, print a table and, as the last line, one JSON object.

        gamma: to compare all under. facts: what else shapes the runs. A run with figures is not
        trained again, one that was stopped goes on.
        """
        backbone = self.training.backbone
        settings = {
            "model": Path(backbone.model).name,
            "rollouts": self.rollouts.name,
            "num_layers": backbone.num_layers,
            "tune": backbone.tune,
            "lora": asdict(backbone.lora),
            "gamma": gamma,
            **self.training.facts(),
            **facts,
        }
        keep_settings(output, settings)
        rows = [
            self._row(run, gamma, output / run.name) for run in tqdm(runs, "runs", file=sys.stderr)
        ]
        result = {"gamma": gamma, **facts, "runs": rows}
        write_figures(output, result)
        end(result, table(table_rows(rows)), self.only_json)

    def _row(self, run: Run, gamma: float, folder: Path) -> dict[str, Any]:
        if not (folder / FIGURES_FILE).exists():
            with contextlib.redirect_stdout(sys.stderr):  # of its log
                train(run.rollouts, folder, training=run.training)
            write_figures(folder, self._evaluate(run.training, gamma, folder))
        return {"axis": run.axis, "setting": run.setting, **read_figures(folder)}

    def _evaluate(self, training: SmallTraining, gamma: float, folder: Path) -> dict[str, Any]:
        reading = Reading(
            base_model=training.backbone.model,
            max_length=training.recipe.max_length,
            only_json=True,
        )
        facts = read_config(folder).training
        with predictors(
            (folder,), self.rollouts, reading, gamma, holdout=training.holdout
        ) as found:
            texts = found[folder.name]
            finished = [text for text in texts if text.rollout.finished]
            return {
                "completions": facts["completions"],
                "cut": facts["cut"],
                "length_error": length_errors(finished, gamma)["0.0"],
                "figures": intervals(texts, gamma),
                "positions": positions.by_position(texts, gamma),
            }


def tables(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By caption; runs that are older than the second lack it."""
    found = {"One change at a time": table_rows(runs)}
    known = {f"{r['axis']} {r['setting']}": r["positions"] for r in runs if "positions" in r}
    return found | ({POSITIONS: positions.table_rows(known)} if known else {})


def table_rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row of a table for each run; length error: the median at the prompt's end."""
    return [
        {"axis": run["axis"], "setting": run["setting"]}
        | {"completions": run["completions"], "cut": run["cut"]}
        | columns(run["figures"])
        | {"length error": f"{run['length_error']:.0%}"}
        for run in runs
    ]
