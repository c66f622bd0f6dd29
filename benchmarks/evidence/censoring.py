"""What to do with completions that max_tokens cut? The treatments, where the truth is known.

    python -m benchmarks.evidence.censoring --rollouts rollouts/ --model MODEL

Completions are cut at the length that leaves `share` of them unfinished, a model is trained on
what is left by each treatment, and all are evaluated on the held-out prompts' completions as they
were sampled. A run that is done is not done again, one that was stopped goes on.
"""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cyclopts import App, Parameter

from benchmarks.evidence.small import SmallLora, SmallRecipe
from trainer.checks import check
from trainer.data import read_rollouts, split
from trainer.evaluation.evaluate import evaluate
from trainer.training.objective import Censored, Objective
from trainer.training.train import Tune, choose_gamma, train

app = App(help=__doc__)
COLUMNS = ("completions", "cut", "r2", "mean mre", "median error at the prompt's end")


def cut_rollouts(rollouts: Path, share: float, output: Path) -> int:
    """Write the rollouts cut so that `share` of them is unfinished; returns the limit in tokens."""
    rows = pq.read_table(rollouts).to_pylist()
    limit = int(np.quantile([len(row["completion_ids"]) for row in rows], 1 - share))
    for row in rows:
        if len(row["completion_ids"]) > limit:
            row |= {"completion_ids": row["completion_ids"][:limit], "finish_reason": "length"}
    output.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), output)
    return limit


def row_of(checkpoint: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of a treatment."""
    facts = json.loads((checkpoint / "config.json").read_text())["lenvm"]["training"]
    errors = figures["length_error_by_position"]
    return {
        "completions": facts["completions"],
        "cut": facts["cut"],
        "r2": figures["r2"],
        "mean mre": float(np.mean([*figures["mre"].values()])),
        "median error at the prompt's end": errors["0.0"],
    }


@app.default
def main(
    *,
    rollouts: Path,
    model: str,
    share: float = 1 / 3,
    num_layers: int | None = 8,
    tune: Tune = "lora",
    lora: SmallLora = SmallLora(),
    objective: Objective = Objective(),
    recipe: SmallRecipe = SmallRecipe(),
    holdout: float = 0.1,
    output: Path = Path("runs/censoring"),
    only_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Cut, train, evaluate, print a table and, as the last line, one JSON object.

    Parameters
    ----------
    rollouts
        Parquet file or folder of shards, hardly any of them cut.
    model
        Hub name or folder of the backbone.
    share
        Of the completions to leave unfinished.
    num_layers
        Layers of the backbone.
    tune, lora, objective, recipe, holdout
        As for `lenvm train`; `censored` is what is compared.
    output
        Folder of the cut rollouts and the checkpoints.
    only_json
        Print nothing else.
    """
    check(0 < share < 1, "share", share, "between 0 and 1")
    check(0 < holdout < 1, "holdout", holdout, "between 0 and 1")
    data = output / "cut.parquet"
    limit = cut_rollouts(rollouts, share, data)
    known, _ = split(read_rollouts(data), holdout)
    gamma = choose_gamma(known, objective, data)
    rows = {}
    for censored in get_args(Censored):
        checkpoint = output / censored
        aim = replace(objective, censored=censored, gamma=gamma, gamma_percentile=None)
        options: dict[str, Any] = {"num_layers": num_layers, "tune": tune, "lora": lora}
        with redirect_stdout(sys.stderr):
            train(
                *(data, checkpoint),
                model=model,
                objective=aim,
                recipe=recipe,
                holdout=holdout,
                **options,
            )
            figures = evaluate(checkpoint, rollouts, base_model=model, only_json=True)
        rows[censored] = row_of(checkpoint, figures)
    if not only_json:
        print("| censored | " + " | ".join(COLUMNS) + " |")
        print("|---" + "|---:" * len(COLUMNS) + "|")
        for name, row in rows.items():
            print(f"| {name} | " + " | ".join(f"{row[c]:.3g}" for c in COLUMNS) + " |")
    print(json.dumps({"limit": limit, "gamma": gamma, "treatments": rows}))


if __name__ == "__main__":
    app()
