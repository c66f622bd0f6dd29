"""Which of the paper's choices matter? Target, weighting, batches, discount, precision (§4.4).

    python -m benchmarks.evidence.ablations --rollouts rollouts/ --model MODEL

Each choice is changed alone, all others as the paper has them; figures of all runs are compared
under one gamma. A run that is done is not done again.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from benchmarks.evidence.grid import Run, grid_rows, run_grid
from benchmarks.evidence.small import SmallLora, SmallRecipe
from benchmarks.rows import keep_settings
from benchmarks.tables import table
from trainer.checks import check, check_choice
from trainer.data import read_rollouts, split
from trainer.training.objective import Objective
from trainer.training.recipe import Recipe
from trainer.training.train import Tune, choose_gamma

app = App(help=__doc__)
AXES = ("reference", "target", "loss", "weighting", "batches", "gamma", "precision")


def runs_of(
    rollouts: Path, axes: Sequence[str], objective: Objective, recipe: Recipe, mean_length: float
) -> list[Run]:
    """The reference and, on each axis, what differs from it.

    mean_length: tokens of a unit of the target `length`, whose errors are too large without.
    """

    def aim(axis: str, setting: str, **changes: Any) -> Run:
        options = {"objective": replace(objective, **changes)}
        return Run(axis=axis, setting=setting, rollouts=rollouts, options=options)

    def run(axis: str, setting: str, **changes: Any) -> Run:
        options = {"recipe": replace(recipe, **changes)}
        return Run(axis=axis, setting=setting, rollouts=rollouts, options=options)

    runs = [
        Run(axis="reference", setting="paper", rollouts=rollouts),
        aim("target", "length", target="length", target_scale=mean_length),
        aim("target", "log_length", target="log_length"),
        aim("target", "normalised_length", target="normalised_length"),
        aim("loss", "huber", loss="huber"),
        aim("loss", "bce", loss="bce"),
        aim("weighting", "trajectory", weighting="trajectory"),
        run("batches", "grouped", batches="grouped"),
        *(
            aim("gamma", f"percentile {p}", gamma=None, gamma_percentile=float(p))
            for p in (50, 90, 100)
        ),
        run("precision", "float32" if recipe.mixed else "bfloat16", bf16=not recipe.mixed),
    ]
    return [run for run in runs if run.axis in axes]


@app.default
def main(
    *,
    rollouts: Path,
    model: str,
    axes: tuple[str, ...] = AXES,
    num_layers: int | None = 8,
    tune: Tune = "lora",
    lora: SmallLora = SmallLora(),
    objective: Objective = Objective(),
    recipe: SmallRecipe = SmallRecipe(),
    holdout: float = 0.1,
    output: Path = Path("runs/ablations"),
    only_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Train, evaluate, print a table and, as the last line, one JSON object.

    Parameters
    ----------
    rollouts
        Parquet file or folder of shards.
    model
        Hub name or folder of the backbone.
    axes
        reference, target, loss, weighting, batches, gamma, precision.
    num_layers
        Layers of the backbone.
    tune, lora, objective, recipe, holdout
        Of the reference, as for `lenvm train`.
    output
        Folder of the checkpoints and figures.
    only_json
        Print nothing else.
    """
    for axis in axes:
        check_choice("axes", axis, AXES)
    check(0 < holdout < 1, "holdout", holdout, "between 0 and 1")
    known, _ = split(read_rollouts(rollouts), holdout)
    gamma = choose_gamma(known, objective, rollouts)
    finished = [len(r.completion_ids) for r in known if r.finished]
    base: dict[str, Any] = {"model": model, "num_layers": num_layers, "tune": tune, "lora": lora}
    base |= {"objective": objective, "recipe": recipe, "holdout": holdout}
    names = {"model": Path(model).name, "rollouts": rollouts.name}
    keep_settings(output, {name: repr(value) for name, value in base.items()} | names)
    runs = runs_of(rollouts, axes, objective, recipe, sum(finished) / max(len(finished), 1))
    rows = run_grid(runs, rollouts, output, gamma, base)
    line = json.dumps({"gamma": gamma, "runs": rows})
    (output / "figures.json").write_text(line + "\n")
    if not only_json:
        print(table(grid_rows(rows)))
    print(line)


if __name__ == "__main__":
    app()
