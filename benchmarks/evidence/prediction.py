"""How well do value models predict, before the first token and at every token?

    python -m benchmarks.evidence.prediction --rollouts rollouts/ --checkpoint A --checkpoint B

On prompts that the training of the first did not see, as `lenvm evaluate` has it, here with
intervals. At the prompt's end, in lengths: MRE (paper, Eq. 13 to 15), the median error and the rank
correlation; MRE also in values; and how far the mean length lies above the forecasts of the first.
At every token of the finished completions: squared error and R² of u. All are compared under the
gamma of the first.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App

from benchmarks.estimates import Estimate, Sample, bootstrap, estimate
from benchmarks.figures import write_figures
from benchmarks.provenance import end
from trainer.evaluation.figures import Predicted, squared_errors
from trainer.evaluation.forecasts import bias, forecasts_of, rank_correlation, together
from trainer.evaluation.predictors import predictors
from trainer.output import table
from trainer.reading import Reading
from value_server.contract.checkpoint import read_config

app = App(help=__doc__)
Figures = dict[str, Estimate]


def intervals(texts: Sequence[Predicted], gamma: float) -> Figures:
    """`mre DOMAIN` and `relative_error_of_u DOMAIN`; of all domains `median_error`, and
    `rank_correlation` unless all predictions are the same; of finished texts `loss` (mean squared
    error of u) and `r2`."""
    forecasts = forecasts_of(texts, gamma)
    figures: dict[str, Estimate | None] = {}
    for domain, own in forecasts.items():
        figures[f"mre {domain}"] = estimate(Sample(list(own.errors), own.prompts))
        of_u = Sample(list(own.errors_of_u), own.prompts)
        figures[f"relative_error_of_u {domain}"] = estimate(of_u)
    every = together(forecasts)
    figures["median_error"] = bootstrap(lambda errors: float(np.median(errors)), every.errors)
    figures["rank_correlation"] = bootstrap(rank_correlation, every.predicted, every.length)
    finished = [text for text in texts if text.rollout.finished]
    groups = [text.rollout.prompt_id for text in finished for _ in text.u]
    squared, spread = (Sample(list(part), groups) for part in squared_errors(finished))
    figures["loss"] = estimate(squared)
    figures["r2"] = estimate(squared, spread, of=lambda error, total: 1 - error / total)
    return {name: figure for name, figure in figures.items() if figure is not None}


def columns(figures: Figures) -> dict[str, Any]:
    """Errors in percent, the squared error in thousandths; n: held-out prompts, and tokens."""
    mre = {name: e for name, e in figures.items() if name.startswith("mre ")}
    return {
        **{f"{name}, %": e.scaled(100) for name, e in mre.items()},
        "median error, %": figures["median_error"].scaled(100),
        "rank correlation": figures.get("rank_correlation"),
        **{"loss / 0.001": figures["loss"].scaled(1000), "R²": figures["r2"]},
        **{"prompts": figures["median_error"].n, "tokens": figures["loss"].n},
    }


def table_rows(models: Mapping[str, Figures]) -> list[dict[str, Any]]:
    """A row of a table for each model."""
    return [{"model": name, **columns(figures)} for name, figures in models.items()]


@app.default
def main(
    *,
    rollouts: Path,
    checkpoint: tuple[Path, ...],
    training: Path | None = None,
    holdout: float | None = None,
    reading: Reading = Reading(),
    output: Path = Path("runs/prediction"),
) -> None:
    """Predict, print a table and, as the last line, one JSON object.

    Parameters
    ----------
    rollouts
        Parquet file or folder of shards, several completions a prompt.
    checkpoint
        Folders that `lenvm train` wrote; give it once for each.
    training
        Rollouts to take the baselines from, as for `lenvm evaluate`; for rollouts of other prompts.
    holdout
        Share of the prompts that was held out, 1 for all; as for `lenvm evaluate`.
    output
        Folder of the figures.
    """
    reading.check()
    gamma = read_config(checkpoint[0]).gamma
    with predictors(
        checkpoint, rollouts, reading, gamma, training=training, holdout=holdout
    ) as found:
        models = {name: intervals(texts, gamma) for name, texts in found.items()}
        first = next(iter(found.values()))
        biases = bias(forecasts_of(first, gamma))
        result = {"gamma": gamma, "rollouts": rollouts.name, "models": models, "bias": biases}
        write_figures(output, result)
        end(result, table(table_rows(models)), reading.only_json)


if __name__ == "__main__":
    app()
