"""`lenvm evaluate`: how well a value model predicts, beside guesses that read no text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
from cyclopts import Parameter
from numpy.typing import NDArray

from trainer.checks import check, check_choice
from trainer.data import Rollout, prompt_hashes, read_rollouts, split
from trainer.evaluation.baselines import baseline_logits, fit_baselines
from trainer.evaluation.card import result_table, write_card
from trainer.evaluation.figures import summarise
from trainer.evaluation.journal import Journal
from trainer.evaluation.predict import Precision, load_model, predict_all
from trainer.plots import check_picture, plot_calibration
from value_server.contract.checkpoint import LenvmConfig
from value_server.contract.values import length_from_logit, logit_from_length


def evaluate(
    checkpoint: Path,
    rollouts: Path,
    *,
    base_model: str | None = None,
    compare: Sequence[Path] = (),
    training: Path | None = None,
    holdout: float | None = None,
    max_length: int = 3000,
    dtype: Precision = "auto",
    plot: Path | None = None,
    card: bool = False,
    only_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> dict[str, Any]:
    """Evaluate CHECKPOINT on the prompts of ROLLOUTS that training did not see.

    Prints a table and, as its last line, one JSON object. Raises ValueError naming the option
    that is wrong.

    Parameters
    ----------
    checkpoint
        Folder that `lenvm train` wrote.
    rollouts
        Parquet file or folder of shards, as in training.
    base_model
        Where the backbone lies, if not where the checkpoint says.
    compare
        Other checkpoints for the same table, as one trained with `--tune head`.
    training
        Rollouts to take the baselines from; by default those that training saw.
    holdout
        Share of the prompts that was held out, 1 for all. By default what the checkpoint
        recorded, and 1 for rollouts of other prompts than those trained on.
    max_length
        Tokens of a text that are looked at.
    dtype
        Of the backbone; auto is that of `lenvm serve`: bfloat16 where the device has it.
    plot
        Picture of predicted against true lengths to write, as .png, .svg or .pdf.
    card
        Write the figures into the checkpoint's README.md.
    only_json
        Print nothing else.
    """
    check(holdout is None or 0 < holdout <= 1, "holdout", holdout, "above 0 and at most 1")
    check(max_length > 1, "max_length", max_length, "above 1")
    check_choice("dtype", dtype, get_args(Precision))
    check_picture("plot", plot)
    paths = {path.name: path for path in (checkpoint, *compare)}
    check(len(paths) == 1 + len(compare), "compare", [*map(str, compare)], "of different names")
    models = {name: load_model(path, base_model, dtype) for name, path in paths.items()}
    model = models.pop(checkpoint.name)
    gamma = model.lenvm.gamma
    known, held_out = split_as_trained(read_rollouts(rollouts), model.lenvm, holdout)
    if not any(r.finished and len(r.prompt_ids) <= max_length for r in held_out):
        raise ValueError(
            f"holdout: {rollouts} has no finished completion to evaluate with holdout {holdout} "
            f"and max_length {max_length}"
        )
    if training:
        known = read_rollouts(training)
    journals = {
        name: Journal.of(paths[name], loaded, held_out, max_length)
        for name, loaded in {checkpoint.name: model, **models}.items()
    }
    fitted = None if training else model.lenvm.training.get("baselines")
    fitted = fitted or fit_baselines(known or held_out, gamma, max_length)
    baselines = {
        name: [baseline_logits(coefficients, r, max_length) for r in held_out]
        for name, coefficients in fitted.items()
    }
    for name, other in models.items():
        logits = predict_all(other, held_out, max_length, name, only_json, journals[name])
        baselines[name] = [with_gamma(z, other.lenvm.gamma, gamma) for z in logits]
    name = checkpoint.name
    values = predict_all(model, held_out, max_length, name, only_json, journals[name])
    result = summarise(held_out, values, gamma, max_length)
    result["baselines"] = {
        name: {
            key: figure
            for key, figure in summarise(held_out, logits, gamma, max_length).items()
            if key in ("mre", "r2", "r2_with_bounds")
        }
        for name, logits in baselines.items()
    }
    result["baseline_mre"] = {
        domain: min(figures["mre"][domain] for figures in result["baselines"].values())
        for domain in result["mre"]
    }
    if plot:
        plot_calibration(result, plot)
    if card:
        write_card(checkpoint, model.lenvm, result | {"rollouts": rollouts.name})
    if not only_json:
        print(result_table(result))
    print(json.dumps(result))
    for journal in journals.values():
        journal.remove()
    return result


def split_as_trained(
    rollouts: Sequence[Rollout], config: LenvmConfig, holdout: float | None
) -> tuple[list[Rollout], list[Rollout]]:
    """(seen in training, not seen), as the checkpoint's facts tell, or by `holdout`."""
    facts = config.training
    if holdout is None:
        sketch = facts.get("prompt_sketch")
        others = sketch is not None and not set(sketch) & set(prompt_hashes(rollouts))
        holdout = 1.0 if others else facts.get("holdout", 1.0)
    return split(rollouts, holdout)


def with_gamma(z: NDArray[np.float32], before: float, after: float) -> NDArray[np.float64]:
    """The logits of the same lengths under another gamma."""
    length = length_from_logit(torch.from_numpy(z).double(), before)
    converted: NDArray[np.float64] = logit_from_length(length, after).numpy()
    return converted
