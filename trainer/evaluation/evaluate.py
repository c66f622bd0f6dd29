"""`lenvm evaluate`: how well a value model predicts, beside guesses without one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.checks import check
from trainer.evaluation.card import agreement_table, result_table, write_card
from trainer.evaluation.figures import Predicted, summarise
from trainer.evaluation.lookahead import Agreement, agreement
from trainer.evaluation.predictors import predictors, split_as_trained
from trainer.evaluation.report import check_page, write_report
from trainer.output import show
from trainer.plots import check_picture, plot_calibration
from trainer.reading import Reading
from trainer.rollout_files import TokenizerOf, check_tokenizer, name_of, read_rollouts
from value_server.contract.checkpoint import read_config

# Of a baseline; the first model has more.
COMPARED = (
    *("mre", "median_error", "rank_correlation", "relative_error_of_u"),
    *("r2", "r2_with_bounds"),
)


def evaluate(
    checkpoint: Path,
    rollouts: Path,
    *,
    compare: Sequence[Path] = (),
    training: Path | None = None,
    holdout: float | None = None,
    reading: Reading = Reading(),
    ahead: Agreement = Agreement(),
    plot: Path | None = None,
    html: Path | None = None,
    card: bool = False,
) -> dict[str, Any]:
    """Evaluate CHECKPOINT on the prompts of ROLLOUTS that training did not see.

    Prints a table and, as its last line, one JSON object. Raises ValueError naming the option
    that is wrong.

    Parameters
    ----------
    checkpoint
        Folder that `lenvm train` wrote.
    rollouts
        Parquet file or folder of shards; as in training, with several of them, too.
    compare
        Other checkpoints for the same table, as one trained with `--tune head`.
    training
        Rollouts to take the baselines from; by default those that training saw.
    holdout
        Share of the prompts that was held out, 1 for all. By default what the checkpoint
        recorded, and 1 for rollouts of other prompts than those trained on.
    plot
        Picture of predicted against true lengths to write, as .png, .svg or .pdf.
    html
        Page to write: calibration, errors by domain and position, and the worst prompts, with
        their texts.
    card
        Write the figures into the checkpoint's README.md.
    """
    check(holdout is None or 0 < holdout <= 1, "holdout", holdout, "above 0 and at most 1")
    reading.check()
    check_picture("plot", plot)
    check_page("html", html)
    config = read_config(checkpoint)
    ahead.check(config)
    learnt = TokenizerOf(str(checkpoint), config.tokenizer_fingerprint)
    for path in filter(None, (rollouts, training)):
        check_tokenizer(path, learnt)
    with predictors(
        (checkpoint, *compare),
        rollouts,
        reading,
        config.gamma,
        training=training,
        holdout=holdout,
    ) as found:
        result = summarise_all(found, config.gamma)
        text = result_table(result)
        if ahead.lookahead_positions:
            held_out = split_as_trained(read_rollouts(rollouts), config, holdout)[1]
            figures = agreement(reading.load(checkpoint), held_out, ahead, reading)
            result["lookahead"] = figures
            text += "\n\n" + agreement_table(figures)
        if plot:
            plot_calibration(result, plot)
        told = result | {"rollouts": name_of(rollouts)}
        if html:
            write_report(html, checkpoint, config, told, next(iter(found.values())))
        if card:
            write_card(checkpoint, config, told)
        show(text, result, reading.only_json)
    return result


def summarise_all(found: Mapping[str, Sequence[Predicted]], gamma: float) -> dict[str, Any]:
    """The figures of the first, and what of them the others are compared by."""
    first, *others = (summarise(texts, gamma) for texts in found.values())
    first["baselines"] = {
        name: {key: figures[key] for key in COMPARED}
        for name, figures in zip(list(found)[1:], others, strict=True)
    }
    first["baseline_mre"] = {
        domain: min(figures["mre"][domain] for figures in others) for domain in first["mre"]
    }
    return first
