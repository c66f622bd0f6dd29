"""How well do value models predict, before the first token and at every token?

    python -m benchmarks.evidence.prediction --rollouts rollouts/ --checkpoint A --checkpoint B

On prompts that the training of the first did not see, as `lenvm evaluate` has it, here with
intervals. At the prompt's end, in lengths: MRE (paper, Eq. 13 to 15), the median error and the rank
correlation; MRE also in values; and how far the mean length lies above the forecasts of the first.
At every token of the finished completions: squared error and R² of u. All are compared under the
gamma of the first, so models that learnt with several gammas can be given, too.

By position the error of what is still to come (positions.py). Of the first: what errors of u make
of lengths under several gammas (inversion.py), and which tokens lengthen or shorten (tokens.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.estimates import Estimate, Sample, bootstrap, estimate
from benchmarks.evidence import inversion, positions, tokens
from benchmarks.figures import write_figures
from benchmarks.provenance import end
from trainer.evaluation.figures import Predicted, squared_errors
from trainer.evaluation.forecasts import bias, forecasts_of, rank_correlation, together
from trainer.evaluation.predictors import predictors
from trainer.output import table
from trainer.reading import Reading
from value_server.contract.checkpoint import read_config, tokenizer_source
from value_server.contract.values import check_gamma

app = App(help=__doc__)
POSITIONS = "Tokens to come, after a share of a finished text or a number of tokens"
EXACT = f"Error of a length if u is {inversion.ERROR_OF_U} too small or too large"
MEASURED = "Errors of u and of lengths, all tokens of finished texts"
TOKENS = "Tokens that lengthen and shorten, by the first model"
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


def figures_of(
    found: Mapping[str, Sequence[Predicted]],
    gamma: float,
    gammas: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Of what all models predict, under `gamma`; by name, the first to be told more of."""
    first = next(iter(found.values()))
    return {
        "models": {name: intervals(texts, gamma) for name, texts in found.items()},
        "bias": bias(forecasts_of(first, gamma)),
        "positions": {name: positions.by_position(texts, gamma) for name, texts in found.items()},
        "inversion": {
            "exact": inversion.exact(gammas),
            "measured": inversion.measured(first, gamma, gammas),
        },
        "tokens": tokens.length_tokens(first, gamma, tokenizer),
    }


def tables(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By caption; runs that are older than a table lack it."""
    found = {f"Under gamma {result['gamma']:.5g}": table_rows(result["models"])}
    if "positions" in result:
        found[POSITIONS] = positions.table_rows(result["positions"])
        found[EXACT] = inversion.exact_rows(result["inversion"]["exact"])
        found[MEASURED] = inversion.measured_rows(result["inversion"]["measured"])
        found[TOKENS] = tokens.table_rows(result["tokens"])
    return found


@app.default
def main(
    *,
    rollouts: Path,
    checkpoint: tuple[Path, ...],
    training: Path | None = None,
    holdout: float | None = None,
    gammas: tuple[float, ...] = (0.98, 0.999),
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
    gammas
        Beside the first's, to tell errors of u under.
    output
        Folder of the figures.
    """
    reading.check()
    config = read_config(checkpoint[0])
    gamma = config.gamma
    gammas = tuple(sorted({gamma, *map(check_gamma, gammas)}))
    base_model = reading.base_model or config.base_model
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(checkpoint[0], base_model))
    with predictors(
        checkpoint, rollouts, reading, gamma, training=training, holdout=holdout
    ) as found:
        result = {
            **{"gamma": gamma, "rollouts": rollouts.name},
            **figures_of(found, gamma, gammas, tokenizer),
        }
        write_figures(output, result)
        told = (f"{caption}:\n\n{table(rows)}" for caption, rows in tables(result).items())
        end(result, "\n\n".join(told), reading.only_json)


if __name__ == "__main__":
    app()
