"""Length as a reward of its own: advantages with the value model as their baseline.

Paper, Appendix C (Eq. 19 to 26): each completion token costs 1 - gamma, so that the return from
a state is G = -(1 - gamma^r), which is what a value model predicts: V = -u. Its advantages are
added to those of the task, with a scale that may follow a schedule.

Shapes are those of TRL: rewards, advantages, returns and masks (B, R), where entry k belongs to
completion token k, and `mask` is 1 for the tokens of a completion, its end-of-sequence token
included, 0 after it. `values` are (B, R + 1): entry k is that of the state before token k, the
last one of the state after all. No function changes its arguments.

Legend: B completions, P prompt tokens with padding on the left, R completion tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.scan import backward_scan
from value_server.contract.values import check_gamma, value_from_logit
from value_server.model.value_model import ValueModel


def completion_logits(
    model: ValueModel, input_ids: Tensor, attention_mask: Tensor, completion_length: int
) -> Tensor:
    """(B, R + 1) logits z from the last prompt token on, of (B, P + R) texts.

    `completion_length` is R. Positions count the tokens that are no padding.
    """
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    z = model(input_ids, position_ids=position_ids, attention_mask=attention_mask)
    return z[:, -completion_length - 1 :]


def length_values(z: Tensor, mask: Tensor, ended: Tensor) -> Tensor:
    """(B, R + 1) values V = -u from (B, R + 1) logits; 0 after the end and on padding.

    ended: (B,) True where end-of-sequence came. A completion that was cut keeps the value of its
    last state: what would have followed still costs.
    """
    _check_shapes(mask, z)
    states = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1).bool()
    last = mask.sum(dim=1).long()
    over = ended[:, None] & (torch.arange(z.shape[1], device=z.device) == last[:, None])
    return torch.where(states & ~over, -value_from_logit(z), 0)


def length_rewards(mask: Tensor, gamma: float) -> Tensor:
    """(B, R) -(1 - gamma) for each token of a completion."""
    return -(1 - check_gamma(gamma)) * mask.float()


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each (B, R), 0 on padding; returns are the targets of `values`.

    A_t = δ_t + gamma·lam·A_{t+1} with δ_t = r_t + gamma·V_{t+1} - V_t. With lam 1 the advantage
    of a finished completion is its return less the baseline.
    """
    _check_shapes(mask, values)
    if not 0 <= lam <= 1:
        raise ValueError(f"lam: {lam!r}, must be 0 to 1")
    tokens = mask.float()
    deltas = tokens * (rewards + gamma * values[:, 1:] - values[:, :-1])
    advantages = backward_scan(gamma * lam * tokens, deltas)
    return advantages * tokens, (advantages + values[:, :-1]) * tokens


def combine(task: Tensor, length: Tensor, mask: Tensor, scale: float) -> Tensor:
    """(B, R) task + scale·length advantages, 0 on padding.

    task: (B, R), or (B,) where all tokens of a completion share one, as in GRPO. A scale above 0
    shortens, below 0 lengthens, 0 leaves the task alone.
    """
    if task.dim() == 1:
        task = task[:, None]
    return (task + scale * length) * mask.float()


def linear_schedule(start: float, end: float, steps: int) -> Callable[[int], float]:
    """The scale at each step: from `start` to `end` over `steps`, then constant."""
    if steps < 1:
        raise ValueError(f"steps: {steps!r}, must be above 0")
    return lambda step: start + (end - start) * min(max(step / steps, 0.0), 1.0)


def _check_shapes(mask: Tensor, values: Tensor) -> None:
    expected = (mask.shape[0], mask.shape[1] + 1)
    if tuple(values.shape) != expected:
        raise ValueError(f"values: {tuple(values.shape)}, must be {expected} for this mask")
