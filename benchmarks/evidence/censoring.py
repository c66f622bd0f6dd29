"""What to do with completions that max_tokens cut? The treatments, where the truth is known.

    python -m benchmarks.evidence.censoring --rollouts rollouts/ --model MODEL

Completions are cut at the length that leaves `share` of them unfinished, a model is trained on
what is left by each treatment, and all are evaluated on the held-out prompts' completions as they
were sampled. A run that is done is not done again, one that was stopped goes on.
"""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cyclopts import App

from benchmarks.evidence.grid import Grid, Run
from trainer.checks import check
from trainer.data import finished_lengths
from trainer.training.objective import Censored

app = App(help=__doc__)


def cut_rollouts(rollouts: Path, share: float, output: Path) -> int:
    """Write the rollouts cut so that `share` of them is unfinished; returns the limit in tokens."""
    table = pq.read_table(rollouts)
    rows = table.to_pylist()
    limit = int(np.quantile([len(row["completion_ids"]) for row in rows], 1 - share))
    for row in rows:
        if len(row["completion_ids"]) > limit:
            row |= {"completion_ids": row["completion_ids"][:limit], "finish_reason": "length"}
    output.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), output)
    return limit


@app.default
def main(*, grid: Grid, share: float = 1 / 3, output: Path = Path("runs/censoring")) -> None:
    """Cut, train, evaluate, print a table and, as the last line, one JSON object.

    Parameters
    ----------
    share
        Of the completions to leave unfinished; hardly any of the rollouts should be.
    output
        Folder of the cut rollouts, the checkpoints and the figures.
    """
    check(0 < share < 1, "share", share, "between 0 and 1")
    grid.training.check()
    data = output / "cut.parquet"
    limit = cut_rollouts(grid.rollouts, share, data)
    objective = grid.training.objective
    gamma = objective.discount(finished_lengths(grid.training.parts(data)[0]))
    runs = []
    for censored in get_args(Censored):
        aim = replace(objective, censored=censored, gamma=gamma, gamma_percentile=None)
        training = replace(grid.training, objective=aim)
        runs.append(Run(axis="censored", setting=censored, rollouts=data, training=training))
    grid.run(runs, gamma, output, limit=limit)


if __name__ == "__main__":
    app()
