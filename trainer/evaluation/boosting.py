"""Gradient boosting of a squared error, by trees that ask the same at all nodes of a level.

Legend: N rows, F features, D depth of a tree, which has 2^D leaves.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ROUNDS, RATE, DEPTH = 100, 0.1, 3
STEPS = 32  # thresholds of a feature that are tried, at most
SHRINK = 20.0  # rows without a residual that each leaf has beside its own


@dataclass(frozen=True, slots=True)
class Tree:
    """features (D,) and thresholds (D,) of its levels, leaves (2^D,): what it adds."""

    features: list[int]
    thresholds: list[float]
    leaves: Floats

    def __call__(self, x: Floats) -> Floats:
        """(N,) of x (N, F)."""
        place = np.zeros(len(x), dtype=np.int64)
        for feature, threshold in zip(self.features, self.thresholds, strict=True):
            place = 2 * place + (x[:, feature] > threshold)
        return self.leaves[place]


@dataclass(frozen=True, slots=True)
class Boosted:
    """The mean, and what the trees add to it."""

    mean: float
    trees: list[Tree]

    def __call__(self, x: Floats) -> Floats:
        """(N,) predictions for x (N, F)."""
        total = np.full(len(x), self.mean)
        for tree in self.trees:
            total += tree(x)
        return total


def boost(x: Floats, y: Floats) -> Boosted:
    """Fit y (N,) from x (N, F)."""
    shares = np.linspace(0, 1, STEPS + 2)[1:-1]
    thresholds = [np.unique(np.quantile(own, shares)) for own in x.T]
    thresholds = [t[t < own.max()] for t, own in zip(thresholds, x.T, strict=True)]
    parts = [np.searchsorted(t, own) for t, own in zip(thresholds, x.T, strict=True)]
    mean = float(y.mean())
    rest, trees = y - mean, []
    for _ in range(ROUNDS):
        tree, place = _grow(parts, thresholds, rest)
        trees.append(tree)
        rest = rest - tree.leaves[place]
    return Boosted(mean, trees)


def _grow(
    parts: list[NDArray[np.int64]], thresholds: list[Floats], rest: Floats
) -> tuple[Tree, NDArray[np.int64]]:
    """A tree that explains `rest` (N,), and the leaf (N,) of each row."""
    place = np.zeros(len(rest), dtype=np.int64)
    features, chosen = [], []
    for level in range(DEPTH):
        gains = [
            _gains(place, part, 2**level, len(own) + 1, rest)
            for part, own in zip(parts, thresholds, strict=True)
        ]
        feature = int(np.argmax([gain.max(initial=-np.inf) for gain in gains]))
        if not len(gains[feature]):  # no feature has two values
            break
        at = int(gains[feature].argmax())
        features.append(feature)
        chosen.append(float(thresholds[feature][at]))
        place = 2 * place + (parts[feature] > at)
    size = 2 ** len(features)
    sums, counts = np.bincount(place, rest, size), np.bincount(place, minlength=size)
    return Tree(features, chosen, RATE * sums / (counts + SHRINK)), place


def _gains(
    place: NDArray[np.int64], part: NDArray[np.int64], nodes: int, size: int, rest: Floats
) -> Floats:
    """(size - 1,) what the squared error falls by, for each threshold of a feature at all nodes."""
    key = place * size + part
    sums = np.bincount(key, rest, nodes * size).reshape(nodes, size).cumsum(1)
    counts = np.bincount(key, minlength=nodes * size).reshape(nodes, size).cumsum(1)
    below, above = sums[:, :-1], sums[:, -1:] - sums[:, :-1]
    gain = below**2 / (counts[:, :-1] + SHRINK)
    gain = gain + above**2 / (counts[:, -1:] - counts[:, :-1] + SHRINK)
    return np.asarray(gain.sum(0), dtype=np.float64)
