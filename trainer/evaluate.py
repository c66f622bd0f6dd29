"""How well a value model predicts: at the prompt's end and at every token.

MRE: mean over prompts of |u - ū| / ū at the last prompt token, ū the mean of 1 - gamma^R over
the prompt's completions (a cut one counts with its known lower bound). R²: share of the variance
of u over all tokens of finished completions that the prediction explains. Baseline: the mean
value of the training part at the same place.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from trainer.data import NO_LABEL, Rollout, make_example, read_rollouts, split
from value_server.contract.values import length_from_logit, value_from_length
from value_server.model import ValueModel

QUARTERS = (0.0, 0.25, 0.5, 0.75)


def evaluate(
    checkpoint: Path,
    rollouts: Path,
    *,
    base_model: str | None = None,
    holdout: float | None = None,
    max_length: int = 3000,
    json_only: bool = False,
) -> dict[str, Any]:
    """Evaluate CHECKPOINT on the prompts of ROLLOUTS that training held out.

    The last line printed is one JSON object.

    Parameters
    ----------
    checkpoint
        Folder that `lenvm train` wrote.
    rollouts
        Parquet file or folder of shards, as in training.
    base_model
        Where the backbone lies, if not where the checkpoint says.
    holdout
        Share of the prompts that was held out; by default what the checkpoint recorded.
        1 evaluates on all.
    max_length
        Tokens of a text that are looked at.
    json_only
        No progress bar.
    """
    if holdout is not None and not 0 < holdout <= 1:
        raise ValueError(f"holdout: {holdout}, must be above 0 and at most 1")
    model = ValueModel.load(checkpoint, base_model)
    share = model.lenvm.training.get("holdout", 1.0) if holdout is None else holdout
    known, held_out = split(read_rollouts(rollouts), share)
    if not any(r.finished and len(r.prompt_ids) <= max_length for r in held_out):
        raise ValueError(
            f"holdout: {rollouts} has no finished completion to evaluate with holdout {share} "
            f"and max_length {max_length}"
        )
    values = [predict(model, rollout, max_length) for rollout in tqdm(held_out, disable=json_only)]
    result = summarise(held_out, values, known or held_out, model.lenvm.gamma, max_length)
    print(json.dumps(result))
    return result


@torch.inference_mode()
def predict(model: ValueModel, rollout: Rollout, max_length: int) -> NDArray[np.float32]:
    """(T,) logits over prompt and completion, T at most `max_length`."""
    example = make_example(rollout, max_length)
    z: NDArray[np.float32] = model(torch.from_numpy(example.input_ids)[None])[0].numpy()
    return z


def summarise(
    rollouts: Sequence[Rollout],
    logits: Sequence[NDArray[np.float32]],
    training: Sequence[Rollout],
    gamma: float,
    max_length: int,
) -> dict[str, Any]:
    """The figures of `evaluate`; rollouts and logits belong together row by row."""
    mean_value = float(np.mean([_value(_length(r), gamma) for r in training]))
    boundary: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    true_u, predicted_u = [], []
    by_quarter: dict[float, list[float]] = defaultdict(list)
    for rollout, z in zip(rollouts, logits, strict=True):
        start = len(rollout.prompt_ids) - 1
        if start >= len(z):
            continue
        u = 1 / (1 + np.exp(-z.astype(np.float64)))
        key = (rollout.domain, rollout.prompt_id)
        boundary[key].append((float(u[start]), _value(_length(rollout), gamma)))
        if not rollout.finished:
            continue
        example = make_example(rollout, max_length)
        labelled = example.labels != NO_LABEL
        truth = value_from_length(torch.from_numpy(example.labels[labelled]).double(), gamma)
        true_u.append(truth.numpy())
        predicted_u.append(u[labelled])
        lengths = length_from_logit(torch.from_numpy(z[labelled]).double(), gamma).numpy()
        for quarter in QUARTERS:
            at = int(quarter * len(lengths))
            remaining = float(example.labels[labelled][at])
            by_quarter[quarter].append(abs(float(lengths[at]) - remaining) / remaining)
    mre, baseline = _boundary_errors(boundary, mean_value)
    truth_all, predicted_all = np.concatenate(true_u), np.concatenate(predicted_u)
    residual = float(np.square(truth_all - predicted_all).sum())
    return {
        "mre": mre,
        "baseline_mre": baseline,
        "r2": 1 - residual / float(np.square(truth_all - truth_all.mean()).sum()),
        "length_error_by_position": {str(q): float(np.median(v)) for q, v in by_quarter.items()},
        "prompts": len(boundary),
        "completions": sum(map(len, boundary.values())),
    }


def _boundary_errors(
    boundary: dict[tuple[str, str], list[tuple[float, float]]], mean_value: float
) -> tuple[dict[str, float], dict[str, float]]:
    errors: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (domain, _), pairs in boundary.items():
        truth = float(np.mean([true for _, true in pairs]))
        predicted = pairs[0][0]
        errors[domain].append((abs(predicted - truth) / truth, abs(mean_value - truth) / truth))
    means = {domain: np.mean(rows, axis=0) for domain, rows in errors.items()}
    return (
        {domain: float(row[0]) for domain, row in means.items()},
        {domain: float(row[1]) for domain, row in means.items()},
    )


def _length(rollout: Rollout) -> int:
    return len(rollout.completion_ids) + (not rollout.finished)


def _value(length: int, gamma: float) -> float:
    return -float(np.expm1(length * np.log(gamma)))
