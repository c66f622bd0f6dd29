"""Figures of predicted lengths.

Legend: P prompt tokens, R completion tokens, T tokens of a text; u = 1 - gamma^r.

MRE (paper, Eq. 13 to 15): over the prompts of a domain the mean of |û - ū| / ū at the last prompt
token, ū the mean of 1 - gamma^R over the prompt's completions. R²: share of the variance of u
that the prediction explains, over every token with a known target: the last prompt token and all
completion tokens but the last, of all finished completions together.

A completion that max_tokens cut has a lower bound: at least one token more than was seen. In the
MRE and the calibration it counts at that bound. R² and the errors by position leave it out. In
`r2_with_bounds` its tokens take part, with what a prediction falls short of their bounds as its
error; the variance is then what the best constant prediction leaves.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data import Rollout, known_values
from value_server.contract.values import length_from_logit

Floats = NDArray[np.float64]
POSITIONS = (0.0, 0.25, 0.5, 0.75)
CALIBRATION_BINS = 10


def summarise(
    rollouts: Sequence[Rollout],
    logits: Sequence[NDArray[np.floating[Any]]],
    gamma: float,
    max_length: int,
) -> dict[str, Any]:
    """The figures of logits z, (T,) each over prompt and completion, as far as `max_length`.

    Raises ValueError if no finished completion is among them.
    """
    boundary: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    known: list[tuple[Floats, Floats]] = []  # (u, its prediction), finished completions
    bounds: list[tuple[Floats, Floats]] = []
    errors: dict[float, list[float]] = {position: [] for position in POSITIONS}
    for rollout, z in zip(rollouts, logits, strict=True):
        u, own = known_places(rollout, z, gamma, max_length)
        if not len(u):
            continue
        predicted = 1 / (1 + np.exp(-own))
        boundary[rollout.domain, rollout.prompt_id].append((float(u[0]), float(predicted[0])))
        (known if rollout.finished else bounds).append((u, predicted))
        if rollout.finished:
            length = len(rollout.completion_ids)
            for position in POSITIONS:
                at = int(position * length)
                if at < len(u):
                    guess = _length(own[at], gamma)
                    errors[position].append(abs(guess - (length - at)) / (length - at))
    if not known:
        raise ValueError("rollouts: no finished completion among them")
    return {
        "mre": mean_relative_errors(boundary),
        "r2": explained(known, []),
        "r2_with_bounds": explained(known, bounds),
        "length_error_by_position": {
            str(position): float(np.median(rows)) for position, rows in errors.items() if rows
        },
        "calibration": calibration(known + bounds, gamma),
        "prompts": len(boundary),
        "completions": sum(map(len, boundary.values())),
        "cut": len(bounds),
    }


def known_places(
    rollout: Rollout, z: NDArray[np.floating[Any]], gamma: float, max_length: int
) -> tuple[Floats, Floats]:
    """(K,) values u that are known or bounded, and the (K,) logits there; see `known_values`."""
    u = known_values(rollout, gamma, max_length)
    start = len(rollout.prompt_ids) - 1
    return u, z[start : start + len(u)].astype(np.float64)


def relative_error(pairs: Sequence[tuple[float, float]]) -> float:
    """|û - ū| / ū of one prompt, from (u, prediction) of its completions."""
    truth, predicted = np.mean(pairs, axis=0)
    return float(abs(predicted - truth) / truth)


def mean_relative_errors(
    boundary: dict[tuple[str, str], list[tuple[float, float]]],
) -> dict[str, float]:
    """MRE by domain of (u, prediction) pairs by (domain, prompt)."""
    errors: dict[str, list[float]] = defaultdict(list)
    for (domain, _), pairs in boundary.items():
        errors[domain].append(relative_error(pairs))
    return {domain: float(np.mean(rows)) for domain, rows in sorted(errors.items())}


def explained(
    known: Sequence[tuple[Floats, Floats]], bounds: Sequence[tuple[Floats, Floats]]
) -> float:
    """R² of (u, prediction) arrays, all tokens together; those of `bounds` err below u only."""
    u, predicted = (np.concatenate(part) for part in zip(*known, *bounds, strict=True))
    is_known = np.arange(len(u)) < sum(len(values) for values, _ in known)

    def squared_error(prediction: Floats) -> float:
        counts = is_known | (prediction < u)
        return float(np.square(u - prediction)[counts].sum())

    best = u[is_known].mean()
    while (better := u[is_known | (best < u)].mean()) != best:  # rises to the least error
        best = better
    total = squared_error(np.full_like(u, best))
    return 1 - squared_error(predicted) / total if total else float("nan")


def calibration(pairs: Sequence[tuple[Floats, Floats]], gamma: float) -> list[dict[str, float]]:
    """Tokens in equal parts by prediction: the mean value predicted and found, as lengths."""
    u, predicted = (np.concatenate(part) for part in zip(*pairs, strict=True))
    bins = np.array_split(np.argsort(predicted, kind="stable"), CALIBRATION_BINS)
    return [
        {
            "predicted": _length(_logit(predicted[members].mean()), gamma),
            "true": _length(_logit(u[members].mean()), gamma),
        }
        for members in bins
        if len(members)
    ]


def _length(z: float, gamma: float) -> float:
    return float(length_from_logit(torch.tensor(z, dtype=torch.float64), gamma))


def _logit(u: float) -> float:
    return float(np.log(u) - np.log1p(-min(u, np.nextafter(1, 0))))
