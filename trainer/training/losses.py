"""The loss of each token, and its target.

Legend: B rows, T tokens; raw, labels, is_cut (B, T); labels are r in tokens, NO_LABEL where
there is none; is_cut marks texts that max_tokens cut, whose labels are lower bounds.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.data import NO_LABEL
from trainer.scan import backward_scan
from trainer.training.objective import HUBER_DELTA, Objective
from value_server.contract.targets import Readout
from value_server.contract.values import value_from_length


def token_losses(
    raw: Tensor,
    labels: Tensor,
    is_cut: Tensor,
    position_ids: Tensor,
    objective: Objective,
    readout: Readout,
) -> Tensor:
    """(B, T) losses; those of unlabelled positions mean nothing and have no weight."""
    target = token_targets(raw, labels, is_cut, position_ids, objective, readout)
    return losses_against(target, raw, is_cut, objective, readout)


def token_targets(
    raw: Tensor,
    labels: Tensor,
    is_cut: Tensor,
    position_ids: Tensor,
    objective: Objective,
    readout: Readout,
) -> Tensor:
    """(B, T) outputs y* to learn; meaningless where there is no label."""
    if not objective.bootstraps:
        return readout.label(labels.clamp(min=0))
    u = readout.output(raw.detach())
    return lambda_returns(u, labels, is_cut, position_ids, readout.gamma, objective.gae_lambda)


def losses_against(
    target: Tensor, raw: Tensor, is_cut: Tensor, objective: Objective, readout: Readout
) -> Tensor:
    """Losses of raw outputs for targets y*; all of one shape."""
    y = readout.output(raw)
    if objective.loss == "squared":
        losses = (y - target).square()
    elif objective.loss == "huber":
        delta = objective.huber_delta or HUBER_DELTA
        losses = F.huber_loss(y, target, reduction="none", delta=delta)
    else:
        # Less the target's own entropy, so that the best prediction has loss 0.
        entropy = torch.special.entr(target) + torch.special.entr(1 - target)
        losses = F.binary_cross_entropy_with_logits(raw, target, reduction="none") - entropy
    if objective.has_bounds:
        losses = torch.where(is_cut & (y >= target), 0, losses)
    return losses


def lambda_returns(
    u: Tensor, labels: Tensor, is_cut: Tensor, position_ids: Tensor, gamma: float, lam: float
) -> Tensor:
    """Targets G_t = (1 - gamma) + gamma·((1 - lam)·u_{t+1} + lam·G_{t+1}), from values u; (B, T).

    Where no state follows in the text, G is what is known there, 1 - gamma^r, or in a cut text
    the model's own u.
    """
    labelled = labels != NO_LABEL
    goes_on = torch.zeros_like(labelled)
    goes_on[:, :-1] = (
        labelled[:, :-1] & labelled[:, 1:] & (position_ids[:, 1:] == position_ids[:, :-1] + 1)
    )
    end = torch.where(is_cut, u, value_from_length(labels.clamp(min=0), gamma))
    next_u = F.pad(u[:, 1:], (0, 1))
    terms = torch.where(goes_on, (1 - gamma) + gamma * (1 - lam) * next_u, end)
    return backward_scan(gamma * lam * goes_on, terms)
