"""Figures of predicted lengths.

Legend: P prompt tokens, R completion tokens, T tokens of a text, K its known places: the last
prompt token and all completion tokens but the last; u = 1 - gamma^r.

Forecasts are judged prompt by prompt, in lengths (forecasts.py). R²: share of the variance of u
that the prediction explains, over the known places of all finished completions together.

A completion that max_tokens cut has a lower bound: at least one token more than was seen. In the
forecasts' figures and the calibration it counts at that bound. R² and the errors by position
leave it out. In `r2_with_bounds` its tokens take part, with what a prediction falls short of
their bounds as its error; the variance is then what the best constant prediction leaves.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data import Rollout, known_values
from trainer.evaluation.forecasts import bias, forecast_figures, forecasts_of
from value_server.contract.values import length_from_logit

Floats = NDArray[np.float64]
POSITIONS = (0.0, 0.25, 0.5, 0.75)
CALIBRATION_BINS = 10


@dataclass(frozen=True, slots=True)
class Predicted:
    """A completion: u (K,) that are known, or bounded where it was cut, and logits z (K,) there."""

    rollout: Rollout
    u: Floats
    z: Floats

    @property
    def guess(self) -> Floats:
        """(K,) predictions of u."""
        return 1 / (1 + np.exp(-self.z))


def predicted(
    rollouts: Sequence[Rollout],
    logits: Iterable[NDArray[np.floating[Any]]],
    gamma: float,
    max_length: int,
) -> list[Predicted]:
    """Of logits z (T,) over prompt and completion, where the prompt alone fits `max_length`."""
    texts = []
    for rollout, z in zip(rollouts, logits, strict=True):
        u = known_values(rollout, gamma, max_length)
        start = len(rollout.prompt_ids) - 1
        if len(u):
            own = z[start : start + len(u)].astype(np.float64)
            texts.append(Predicted(rollout, u, own))
    return texts


def summarise(texts: Sequence[Predicted], gamma: float) -> dict[str, Any]:
    """All figures. Raises ValueError if no finished completion is among the texts."""
    finished = [text for text in texts if text.rollout.finished]
    if not finished:
        raise ValueError("rollouts: no finished completion among them")
    forecasts = forecasts_of(texts, gamma)
    return {
        **forecast_figures(forecasts),
        "r2": explained(*squared_errors(finished)),
        "r2_with_bounds": explained(*squared_errors(texts)),
        "length_error_by_position": length_errors(finished, gamma),
        "calibration": calibration(texts, gamma),
        "prompts": sum(len(own.prompts) for own in forecasts.values()),
        "completions": len(texts),
        "cut": len(texts) - len(finished),
        "bias": bias(forecasts),
    }


def squared_errors(texts: Sequence[Predicted]) -> tuple[Floats, Floats]:
    """Of the prediction, and of the best constant, at each known place; a bound errs below only."""
    u = np.concatenate([text.u for text in texts])
    is_known = np.concatenate([np.full(len(text.u), text.rollout.finished) for text in texts])

    def squared(prediction: Floats) -> Floats:
        return np.where(is_known | (prediction < u), np.square(u - prediction), 0)

    best = u[is_known].mean()
    while (better := u[is_known | (best < u)].mean()) != best:  # rises to the least error
        best = better
    return squared(np.concatenate([text.guess for text in texts])), squared(np.full_like(u, best))


def explained(error: Floats, spread: Floats) -> float | None:
    """R² of `squared_errors`, all places together; None where all values are the same."""
    total = spread.sum()
    return float(1 - error.sum() / total) if total else None


def length_errors(texts: Sequence[Predicted], gamma: float) -> dict[str, float]:
    """Median of |error| over the tokens to come, by the share of the completion that is written."""
    errors: dict[str, list[float]] = {str(position): [] for position in POSITIONS}
    for text in texts:
        length = len(text.rollout.completion_ids)
        for position in POSITIONS:
            at = int(position * length)
            if at < len(text.u):
                error = abs(_length(text.z[at], gamma) - (length - at))
                errors[str(position)].append(error / (length - at))
    return {position: float(np.median(own)) for position, own in errors.items() if own}


def calibration(texts: Sequence[Predicted], gamma: float) -> list[dict[str, float]]:
    """Places in equal parts by prediction: the mean value predicted and found, as lengths."""
    u = np.concatenate([text.u for text in texts])
    guess = np.concatenate([text.guess for text in texts])
    bins = np.array_split(np.argsort(guess, kind="stable"), CALIBRATION_BINS)
    return [
        {
            "predicted": _length(_logit(guess[members].mean()), gamma),
            "true": _length(_logit(u[members].mean()), gamma),
        }
        for members in bins
        if len(members)
    ]


def _length(z: float, gamma: float) -> float:
    return float(length_from_logit(torch.tensor(z, dtype=torch.float64), gamma))


def _logit(u: float) -> float:
    return float(np.log(u) - np.log1p(-min(u, np.nextafter(1, 0))))
