"""What a value model has to beat: guesses that read no text. (One by words is in lexical.py.)

training mean: the mean value of the training completions, at the prompt's end and over all
their tokens. prompt length: a least-squares line through the log of the prompt's length, and
within a completion through that and the log of the tokens written.

Legend: P prompt tokens, R completion tokens, K labelled positions (see data).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data import Rollout, known_values

Floats = NDArray[np.float64]
# A line leaves (0, 1), a value does not.
LOWEST, HIGHEST = 1e-3, 1 - 1e-3


def _features(prompt: int, count: int) -> Floats:
    """(count, 3): one, log P, log of the tokens written at positions 0 to count - 1."""
    written = np.log1p(np.arange(count, dtype=np.float64))
    return np.stack([np.ones(count), np.full(count, np.log(prompt)), written], axis=1)


def fit_baselines(rollouts: Sequence[Rollout], gamma: float, max_length: int) -> dict[str, Any]:
    """Coefficients on `_features` by baseline: `boundary` of position 0, `tokens` of the others.

    A cut completion counts at its bound at the boundary, and not within. What comes back is JSON.
    """
    boundary_x, boundary_u, token_x, token_u = [], [], [], []
    for rollout in rollouts:
        u = known_values(rollout, gamma, max_length)
        if not len(u):
            continue
        x = _features(len(rollout.prompt_ids), len(u))
        boundary_x.append(x[:1])
        boundary_u.append(u[:1])
        if rollout.finished:
            token_x.append(x)
            token_u.append(u)
    if not token_u:
        return {}
    parts = {
        "boundary": (np.concatenate(boundary_x), np.concatenate(boundary_u)),
        "tokens": (np.concatenate(token_x), np.concatenate(token_u)),
    }
    return {
        name: {part: _least_squares(x[:, :width], u) for part, (x, u) in parts.items()}
        for name, width in (("training mean", 1), ("prompt length", 3))
    }


def _least_squares(x: Floats, u: Floats) -> list[float]:
    weights = np.linalg.lstsq(x, u, rcond=None)[0]
    return [float(w) for w in weights] + [0.0] * (3 - x.shape[1])


def baseline_logits(
    coefficients: dict[str, list[float]], rollout: Rollout, max_length: int
) -> Floats:
    """(T,) logits over prompt and completion; those before the prompt's end mean nothing."""
    prompt = len(rollout.prompt_ids)
    size = min(prompt + len(rollout.completion_ids), max_length)
    count = max(size - prompt + 1, 0)
    x = _features(prompt, count)
    u = x @ coefficients["tokens"]
    u[:1] = x[:1] @ coefficients["boundary"]
    return logits_of_guess(u, size)


def logits_of_guess(u: Floats, size: int) -> Floats:
    """(size,) logits of a guess of u at the last places of a text; those before are 0."""
    u = np.clip(u, LOWEST, HIGHEST)
    return np.concatenate([np.zeros(size - len(u)), np.log(u) - np.log1p(-u)])
