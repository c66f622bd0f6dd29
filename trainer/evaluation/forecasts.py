"""How well the length after a prompt is foretold.

The truth of a prompt is what its completions say together. As in the paper (Eq. 13 to 15), both
sides are values first and become lengths then: L_GT = log(1 - ū) / log gamma, ū the mean of
1 - gamma^R over the prompt's completions, and L̂ the same of the predicted û. The relative error
of a prompt is |L̂ - L_GT| / L_GT; MRE is its mean over the prompts of a domain.

The length of a mean value is not the mean length: length is convex in u, so L_GT is below the
mean of R wherever the lengths of a prompt differ (paper, Appendix F). `bias` tells by how much.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from value_server.contract.values import length_from_logit, value_from_logit

if TYPE_CHECKING:
    from trainer.evaluation.figures import Predicted

Floats = NDArray[np.float64]
ALL = "all"  # domains together
BELOW_ONE = np.nextafter(1, 0)  # where a value rounds to 1 its length is still finite


@dataclass(frozen=True, slots=True)
class Forecasts:
    """Of N prompts: their names, u and predicted u (N,), L_GT and L̂ (N,) in tokens, and the mean
    length (N,) of their completions."""

    prompts: list[str]
    u: Floats
    guess: Floats
    length: Floats
    predicted: Floats
    mean_length: Floats

    @property
    def errors(self) -> Floats:
        """(N,) |L̂ - L_GT| / L_GT."""
        return np.abs(self.predicted - self.length) / self.length

    @property
    def errors_of_u(self) -> Floats:
        """(N,) |û - ū| / ū: smaller than those of lengths, the more so the longer the texts are."""
        return np.abs(self.guess - self.u) / self.u


def forecasts_of(texts: Sequence["Predicted"], gamma: float) -> dict[str, Forecasts]:
    """By domain. A cut completion counts with its bound."""
    found: dict[str, dict[str, list[tuple[float, float, float]]]]
    found = defaultdict(lambda: defaultdict(list))
    for text in texts:
        rollout = text.rollout
        own = (text.u[0], text.z[0], len(rollout.completion_ids) + (not rollout.finished))
        found[rollout.domain][rollout.prompt_id].append(own)
    forecasts = {}
    for domain, prompts in sorted(found.items()):
        means = np.array([np.mean(samples, axis=0) for samples in prompts.values()])
        u, z, mean_length = torch.from_numpy(means).unbind(-1)
        forecasts[domain] = Forecasts(
            [*prompts],
            u.numpy(),
            value_from_logit(z).numpy(),
            length_from_logit(torch.logit(u.clamp(max=BELOW_ONE)), gamma).numpy(),
            length_from_logit(z, gamma).numpy(),
            mean_length.numpy(),
        )
    return forecasts


def together(forecasts: Mapping[str, Forecasts]) -> Forecasts:
    """Those of all domains as one."""
    own = [*forecasts.values()]
    arrays = ("u", "guess", "length", "predicted", "mean_length")
    joined = {name: np.concatenate([getattr(f, name) for f in own]) for name in arrays}
    return Forecasts([name for f in own for name in f.prompts], **joined)


def forecast_figures(forecasts: Mapping[str, Forecasts]) -> dict[str, dict[str, float | None]]:
    """By figure and domain; medians and rank correlations also of all domains together.

    A rank correlation is None where all predictions, or all lengths, are the same.
    """
    every = {**forecasts, ALL: together(forecasts)}
    return {
        "mre": {name: float(own.errors.mean()) for name, own in forecasts.items()},
        "median_error": {name: float(np.median(own.errors)) for name, own in every.items()},
        "rank_correlation": {
            name: rank_correlation(own.predicted, own.length) for name, own in every.items()
        },
        "relative_error_of_u": {
            name: float(own.errors_of_u.mean()) for name, own in forecasts.items()
        },
    }


def bias(forecasts: Mapping[str, Forecasts]) -> dict[str, Any]:
    """Mean length of the completions over the mean of L_GT, and over that of the forecasts.

    The first is what a perfect forecast falls short of the mean length, and 1 where each prompt
    has one completion. Cut completions make both too small.
    """
    own = together(forecasts)
    mean = own.mean_length.mean()
    return {
        "mean_over_truth": float(mean / own.length.mean()),
        "mean_over_forecast": float(mean / own.predicted.mean()),
    }


def rank_correlation(a: Floats, b: Floats) -> float | None:
    """Spearman's: Pearson's of the ranks, equal values sharing theirs. None where all are equal."""
    ranks = np.stack([_ranks(a), _ranks(b)])
    return float(np.corrcoef(ranks)[0, 1]) if (ranks.std(axis=1) > 0).all() else None


def _ranks(x: Floats) -> Floats:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    ranks: Floats = (counts.cumsum() - (counts - 1) / 2)[place]
    return ranks
