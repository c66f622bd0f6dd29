"""What a value model learns: the choices that the paper compares, its own as defaults."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from cyclopts import Parameter

from trainer.checks import check, check_choice
from value_server.contract.targets import IN_UNIT_INTERVAL, SCALED, TARGETS, Target
from value_server.contract.values import gamma_from_length

Loss = Literal["squared", "huber", "bce"]
Weighting = Literal["token", "trajectory"]
Censored = Literal["drop", "bound", "bootstrap", "prompt"]
PERCENTILE = 99.0
HUBER_DELTA = 0.1


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Objective:
    """What the head's output means and how it is fitted."""

    gamma: float | None = None
    """Discount; by default 1 - gamma^L = 0.99 with L a percentile of the finished lengths."""
    gamma_percentile: float | None = None
    """That percentile; by default 99."""
    target: Target = "discounted_return"
    """What the head predicts: the discounted return, or for comparison a length."""
    target_scale: float | None = None
    """Tokens of one unit of a length; by default 1, of normalised_length the longest label."""
    loss: Loss = "squared"
    """Of one token: squared error, Huber, or binary cross-entropy (less its minimum)."""
    huber_delta: float | None = None
    """Error at which Huber turns linear; by default 0.1."""
    weighting: Weighting = "token"
    """Each token counts the same, or each completion."""
    prompt_weight: float = 1.0
    """What a prompt's last token, where a forecast is made, counts for in tokens."""
    gae_lambda: float = 1.0
    """Below 1 the targets are lambda-returns, made from the model's own later values."""
    censored: Censored = "drop"
    """Completions cut by max_tokens: drop them, take their length as a lower bound, go on from
    the model's own value at the cut, or take the bound at the end of the prompt alone."""

    def check(self) -> None:
        """Raises ValueError naming the option that is wrong or has no effect."""
        check_choice("target", self.target, TARGETS)
        check_choice("loss", self.loss, get_args(Loss))
        check_choice("weighting", self.weighting, get_args(Weighting))
        check_choice("censored", self.censored, get_args(Censored))
        check(self.gamma is None or 0 < self.gamma < 1, "gamma", self.gamma, "between 0 and 1")
        if (percentile := self.gamma_percentile) is not None:
            check(0 < percentile <= 100, "gamma_percentile", percentile, "above 0, at most 100")
            check(self.gamma is None, "gamma_percentile", percentile, "left out beside gamma")
        if (scale := self.target_scale) is not None:
            check(0 < scale < float("inf"), "target_scale", scale, "above 0")
            check(self.target in SCALED, "target_scale", scale, f"left out with {self.target}")
        if (delta := self.huber_delta) is not None:
            check(0 < delta < float("inf"), "huber_delta", delta, "above 0")
            check(self.loss == "huber", "huber_delta", delta, f"left out with loss {self.loss}")
        bounded = self.loss != "bce" or self.target in IN_UNIT_INTERVAL
        check(bounded, "loss", self.loss, f"squared or huber with target {self.target}")
        check(self.prompt_weight > 0, "prompt_weight", self.prompt_weight, "above 0")
        check(0 <= self.gae_lambda <= 1, "gae_lambda", self.gae_lambda, "0 to 1")
        if self.target != "discounted_return":
            check(self.gae_lambda == 1, "gae_lambda", self.gae_lambda, f"1 with {self.target}")
            checked = self.censored != "bootstrap"
            check(checked, "censored", self.censored, f"drop, bound or prompt with {self.target}")
        if self.has_bounds:
            others = f"1 with censored {self.censored}"
            check(self.gae_lambda == 1, "gae_lambda", self.gae_lambda, others)

    def discount(self, lengths: Sequence[int]) -> float:
        """gamma, as given or from the finished lengths. Raises ValueError if there are none."""
        if self.gamma is not None:
            return self.gamma
        if not lengths:
            raise ValueError(
                "gamma: the rollouts to learn from have no finished completion to take it from, "
                "one with the finish_reason 'stop'"
            )
        return gamma_from_length(float(np.percentile(lengths, self.gamma_percentile or PERCENTILE)))

    def scale(self, longest: float) -> float:
        """As given; else the longest label where the output is a share of it, and one token."""
        if self.target_scale is not None:
            return self.target_scale
        return longest if self.target == "normalised_length" else 1.0

    @property
    def bootstraps(self) -> bool:
        """Whether targets are made from the model's own values."""
        return self.gae_lambda < 1 or self.censored == "bootstrap"

    @property
    def has_bounds(self) -> bool:
        """Whether labels of cut completions are lower bounds, and err below only."""
        return self.censored in ("bound", "prompt")

    @property
    def judged(self) -> "Objective":
        """For texts that are held out: lengths and bounds alone, no values of the model's own."""
        return replace(self, gae_lambda=1.0, censored="bound") if self.bootstraps else self

    def facts(self) -> dict[str, Any]:
        """What was chosen, but gamma, which the checkpoint holds in its own place."""
        return {k: v for k, v in asdict(self).items() if v is not None and k != "gamma"}
