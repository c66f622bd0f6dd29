"""What a head's output reads as: the paper's discounted return, or what it is compared with.

    target              output y        label y* of r        length from it
    discounted_return   sigmoid(raw)    1 - gamma^r          r = log_gamma(1 - y)
    normalised_length   sigmoid(raw)    min(r / scale, 1)    r = scale · y
    length              softplus(raw)   r / scale            r = scale · y
    log_length          softplus(raw)   log(1 + r)           r = exp(y) - 1

Whatever the target, parts exchange z (see values): of a discounted return it is the raw output,
of the others it is computed from the length.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, log1p, sigmoid
from torch.nn.functional import softplus

from value_server.contract.values import logit_from_length, value_from_length

Target = Literal["discounted_return", "normalised_length", "length", "log_length"]
TARGETS: tuple[Target, ...] = get_args(Target)
IN_UNIT_INTERVAL = ("discounted_return", "normalised_length")
SCALED = ("normalised_length", "length")


@dataclass(frozen=True)
class Readout:
    """gamma: discount; scale: tokens of one unit of the targets in SCALED. Keeps all shapes."""

    target: Target
    gamma: float
    scale: float = 1.0

    def output(self, raw: Tensor) -> Tensor:
        """y from the head's raw output."""
        return sigmoid(raw) if self.target in IN_UNIT_INTERVAL else softplus(raw)

    def label(self, r: Tensor) -> Tensor:
        """y* from a length in tokens."""
        if self.target == "discounted_return":
            return value_from_length(r, self.gamma)
        if self.target == "log_length":
            return log1p(r)
        y = r / self.scale
        return y.clamp(max=1) if self.target == "normalised_length" else y

    def logit(self, raw: Tensor) -> Tensor:
        """The z that parts exchange, from the head's raw output."""
        if self.target == "discounted_return":
            return raw
        y = self.output(raw)
        r = y.expm1() if self.target == "log_length" else self.scale * y
        return logit_from_length(r, self.gamma)
