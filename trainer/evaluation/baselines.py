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
HELD = 2**16  # points before they are made few


def _features(prompt: int, count: int) -> Floats:
    """(count, 3): one, log P, log of the tokens written at positions 0 to count - 1."""
    written = np.log1p(np.arange(count, dtype=np.float64))
    return np.stack([np.ones(count), np.full(count, np.log(prompt)), written], axis=1)


def fit_baselines(rollouts: Sequence[Rollout], gamma: float, max_length: int) -> dict[str, Any]:
    """Coefficients on `_features` by baseline: `boundary` of position 0, `tokens` of the others.

    A cut completion counts at its bound at the boundary, and not within. What comes back is JSON.
    """
    parts = {"boundary": _Points(), "tokens": _Points()}
    for rollout in rollouts:
        u = known_values(rollout, gamma, max_length)
        if not len(u):
            continue
        x = _features(len(rollout.prompt_ids), len(u))
        parts["boundary"].add(x[:1], u[:1])
        if rollout.finished:
            parts["tokens"].add(x, u)
    if not parts["tokens"].count:
        return {}
    return {
        name: {part: points.least_squares(width) for part, points in parts.items()}
        for name, width in (("training mean", 1), ("prompt length", 3))
    }


class _Points:
    """(features, u) of many tokens in little memory: now and then those so far become a few that
    have the same least squares, the R of their QR decomposition."""

    def __init__(self) -> None:
        self.count = 0
        self._blocks: list[Floats] = []
        self._held = 0

    def add(self, x: Floats, u: Floats) -> None:
        """x: (N, 3), u: (N,)."""
        self._blocks.append(np.column_stack([x, u]))
        self.count += len(u)
        self._held += len(u)
        if self._held > HELD:
            _, few = np.linalg.qr(np.concatenate(self._blocks))
            self._blocks = [few]
            self._held = 0

    def least_squares(self, width: int) -> list[float]:
        """Coefficients on the first `width` features, 0 on the others."""
        points = np.concatenate(self._blocks)
        weights = np.linalg.lstsq(points[:, :width], points[:, -1], rcond=None)[0]
        return [float(w) for w in weights] + [0.0] * (3 - width)


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
