"""A figure with its uncertainty: mean, n and a bootstrap confidence interval.

Rows that share a prompt are not independent, so a resample draws prompts with all their rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 95.0  # percent
TAILS = [(100 - LEVEL) / 2, (100 + LEVEL) / 2]


@dataclass(frozen=True, slots=True)
class Sample:
    """values: (N,) one a row. groups: (N,) the prompt of each."""

    values: Sequence[float]
    groups: Sequence[str]

    def by_group(self, names: Sequence[str]) -> tuple[Floats, Floats]:
        """Sum of values and number of rows of each group in `names`."""
        place = {name: i for i, name in enumerate(names)}
        index = [place[group] for group in self.groups]
        sums = np.bincount(index, self.values, len(names)).astype(np.float64)
        return sums, np.bincount(index, minlength=len(names)).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Estimate:
    """value, and the bounds of its confidence interval. n: rows of the first sample. groups: the
    prompts that these are of, which is what an interval rests on; None where it was not kept."""

    value: float
    low: float
    high: float
    n: int
    groups: int | None = None

    def scaled(self, factor: float) -> "Estimate":
        value, low, high = (own * factor for own in (self.value, self.low, self.high))
        return Estimate(value, low, high, self.n, self.groups)

    def interval(self, digits: int) -> list[float]:
        return [round(self.low, digits), round(self.high, digits)]

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap(of: Callable[..., float | None], *values: Floats, seed: int = 0) -> Estimate | None:
    """`of` (N,) values, a prompt each, as a median or a correlation of two; None where that is."""
    if (value := of(*values)) is None:
        return None
    count = len(values[0])
    draws = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))

    def number(*own: Floats) -> float:
        found = of(*own)
        return np.nan if found is None else found

    resampled = [number(*(own[draw] for own in values)) for draw in draws]
    low, high = np.nanpercentile(resampled, TAILS)
    return Estimate(value, float(low), float(high), count, count)


def median(sample: Sample, seed: int = 0) -> Estimate:
    """Of all rows together; a resample draws prompts with all their rows, as in `estimate`.

    For samples of texts rather than of tokens: it takes RESAMPLES numbers a row.
    """
    if not sample.values:
        return Estimate(np.nan, np.nan, np.nan, 0)
    names, place = np.unique(sample.groups, return_inverse=True)
    order = np.argsort(sample.values)
    values = np.asarray(sample.values, np.float64)[order]
    share = np.full(len(names), 1 / len(names))
    draws = np.random.default_rng(seed).multinomial(len(names), share, RESAMPLES)  # (R, G)
    rows = draws[:, place[order]].cumsum(axis=1)  # (R, N) of a resample up to each value
    count = rows[:, -1:]
    below, above = (values[(rows > k).argmax(axis=1)] for k in ((count - 1) // 2, count // 2))
    low, high = np.percentile((below + above) / 2, TAILS)
    return Estimate(float(np.median(values)), float(low), float(high), len(values), len(names))


def estimate(
    *samples: Sample, of: Callable[..., Any] = lambda mean: mean, seed: int = 0
) -> Estimate:
    """`of` the means of the samples, by default the mean of the only one.

    `of` takes a float or a (RESAMPLES,) array for each sample. All samples are resampled by the
    same prompts, so that a difference between arms keeps its pairs.
    """
    if not all(len(sample.values) for sample in samples):
        return Estimate(np.nan, np.nan, np.nan, 0)
    names = sorted({group for sample in samples for group in sample.groups})
    share = np.full(len(names), 1 / len(names))
    draws = np.random.default_rng(seed).multinomial(len(names), share, RESAMPLES)  # (R, G)
    parts = [sample.by_group(names) for sample in samples]
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw may miss a sample altogether
        means = [(draws @ sums) / (draws @ counts) for sums, counts in parts]
        resampled = of(*means)
    low, high = np.nanpercentile(resampled, TAILS)
    value = of(*(sums.sum() / counts.sum() for sums, counts in parts))
    first = samples[0]
    groups = len(set(first.groups))
    return Estimate(float(value), float(low), float(high), len(first.values), groups)
