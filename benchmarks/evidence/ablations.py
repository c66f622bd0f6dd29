"""Which of the paper's choices matter? Target, weighting, batches, discount, precision (§4.4).

    python -m benchmarks.evidence.ablations --rollouts rollouts/ --model MODEL

Each choice is changed alone, all others as the paper has them; figures of all runs are compared
under one gamma. A run that is done is not done again.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cyclopts import App

from benchmarks.evidence.grid import Grid, Run
from trainer.checks import check_choice

app = App(help=__doc__)
AXES = ("reference", "target", "loss", "weighting", "batches", "gamma", "precision")


def runs_of(grid: Grid, axes: Sequence[str], mean_length: float) -> list[Run]:
    """The reference and, on each axis, what differs from it.

    mean_length: tokens of a unit of the target `length`, whose errors are too large without.
    """
    reference = grid.training

    def run(axis: str, setting: str, **changes: Any) -> Run:
        training = replace(reference, **changes)
        return Run(axis=axis, setting=setting, rollouts=grid.rollouts, training=training)

    def aim(axis: str, setting: str, **changes: Any) -> Run:
        return run(axis, setting, objective=replace(reference.objective, **changes))

    def step(axis: str, setting: str, **changes: Any) -> Run:
        return run(axis, setting, recipe=replace(reference.recipe, **changes))

    mixed = reference.recipe.mixed
    runs = [
        run("reference", "paper"),
        aim("target", "length", target="length", target_scale=mean_length),
        aim("target", "log_length", target="log_length"),
        aim("target", "normalised_length", target="normalised_length"),
        aim("loss", "huber", loss="huber"),
        aim("loss", "bce", loss="bce"),
        aim("weighting", "trajectory", weighting="trajectory"),
        step("batches", "grouped", batches="grouped"),
        *(
            aim("gamma", f"percentile {p}", gamma=None, gamma_percentile=float(p))
            for p in (50, 90, 100)
        ),
        step("precision", "float32" if mixed else "bfloat16", bf16=not mixed),
    ]
    return [run for run in runs if run.axis in axes]


@app.default
def main(
    *, grid: Grid, axes: tuple[str, ...] = AXES, output: Path = Path("runs/ablations")
) -> None:
    """Train, evaluate, print a table and, as the last line, one JSON object.

    Parameters
    ----------
    axes
        reference, target, loss, weighting, batches, gamma, precision.
    output
        Folder of the checkpoints and figures.
    """
    for axis in axes:
        check_choice("axes", axis, AXES)
    grid.training.check()
    lengths = grid.lengths()
    gamma = grid.training.objective.discount(lengths)
    runs = runs_of(grid, axes, sum(lengths) / max(len(lengths), 1))
    grid.run(runs, gamma, output)


if __name__ == "__main__":
    app()
