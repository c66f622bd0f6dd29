"""Value, logit and length: the only definition of what a value is.

Legend: r = tokens still to come after a state, the end-of-sequence token included;
gamma in (0, 1) belongs to the checkpoint; u = 1 - gamma^r in [0, 1) is minus the paper's
return G = -(1 - gamma^r); z = the head's raw logit, u = sigmoid(z).

Parts exchange z, never a clamped u: u of a long text rounds to 1, z does not. All
conversions are exact, without an epsilon, and keep dtype and shape.
"""

import math

import torch
from torch import Tensor


def check_gamma(gamma: float) -> float:
    """Return `gamma`; raises ValueError unless 0 < gamma < 1."""
    if not 0.0 < gamma < 1.0:
        raise ValueError(f"gamma must lie in (0, 1), got {gamma!r}")
    return gamma


def length_from_logit(z: Tensor, gamma: float) -> Tensor:
    """r = softplus(z) / -ln(gamma), in tokens. z = -inf gives 0."""
    return torch.logaddexp(z, torch.zeros_like(z)) / -math.log(check_gamma(gamma))


def logit_from_length(r: Tensor, gamma: float) -> Tensor:
    """z = log(expm1(-r ln gamma)); r in tokens, r = 0 gives -inf. Raises ValueError for r < 0."""
    if bool((r < 0).any()):
        raise ValueError(f"a length must not be negative, got {r.min().item()}")
    x = r * -math.log(check_gamma(gamma))
    # log(expm1(x)) without the overflow of expm1 at large x.
    return x + torch.log(-torch.expm1(-x))


def logit_in_gamma(z: Tensor, theirs: float, ours: float) -> Tensor:
    """The same lengths, told in another gamma. NaN stays."""
    return z if theirs == ours else logit_from_length(length_from_logit(z, theirs), ours)


def value_from_length(r: Tensor, gamma: float) -> Tensor:
    """u = 1 - gamma^r."""
    return -torch.expm1(r * math.log(check_gamma(gamma)))


def value_from_logit(z: Tensor) -> Tensor:
    """u = sigmoid(z)."""
    return torch.sigmoid(z)


def remaining_goal(total: int, generated: int) -> int:
    """Tokens that should follow one more token, of `total` completion tokens.

    With `generated` tokens out, the candidate of this step is number `generated` + 1, so
    r* = total - (generated + 1). `total` counts the end-of-sequence token, as the OpenAI
    `usage.completion_tokens` does; r* = 0 means that this token must be the end. Negative
    past the target.
    """
    return total - (generated + 1)


def gamma_from_length(length: float, mass: float = 0.99) -> float:
    """gamma such that 1 - gamma^length = mass (paper: the 99th percentile of lengths).

    Raises ValueError unless length > 0 and 0 < mass < 1.
    """
    if length <= 0 or not 0.0 < mass < 1.0:
        raise ValueError(f"need length > 0 and 0 < mass < 1, got {length!r} and {mass!r}")
    return math.exp(math.log1p(-mass) / length)
