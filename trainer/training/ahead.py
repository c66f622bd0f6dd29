"""What the lookahead head learns: values after next tokens, beside the value itself.

Legend: B rows, T tokens, N positions, K candidates; z' what the head tells, s the shares of the
candidates of a position, u = sigmoid(z).

    after the sampled token   the loss of the value, for the model's own value at the next token,
                              or for the label there: unbiased, but its noise is a thousand times
                              what next tokens differ by
    after candidates          (sum of s·(u' - u))², and the mean of ((u' - its mean) - (u - its
                              mean))² over the candidates, u the teacher's
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from cyclopts import Parameter
from torch import Tensor

from trainer.checks import check, check_choice
from trainer.data import NO_LABEL
from trainer.training.losses import losses_against
from trainer.training.objective import Objective
from value_server.contract.targets import Readout

Sampled = Literal["value", "label"]
Batch = Mapping[str, Tensor]
Places = tuple[Tensor, Tensor]  # (N,) positions counted through all B·T, (N, K) next tokens


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Ahead:
    """The lookahead head: its rank, and how much each part of its loss counts."""

    lookahead: int = 0
    """Rank of the head that tells the values after all next tokens; 0 leaves it out."""
    lookahead_weight: float = 1.0
    """What the value after a sampled token counts for, of the value at it."""
    sampled: Sampled = "value"
    """Its target: the value that the model itself gives to that token, or that token's label."""
    candidates: Path | None = None
    """What `lenvm distil` wrote: exact values after candidates, to learn as well."""
    mean_weight: float = 1.0
    """What the mean over the candidates of a position counts for; like a token's value at 1."""
    within_weight: float = 10.0
    """What the differences among the candidates of a position count for."""
    within_exponent: float = 1.0
    """Among these a candidate counts as its probability to this power: at 0 all count alike."""

    def check(self, objective: Objective) -> None:
        """Raises ValueError naming the option that is wrong."""
        check(self.lookahead >= 0, "lookahead", self.lookahead, "at least 0")
        for name in ("lookahead_weight", "mean_weight", "within_weight", "within_exponent"):
            value = getattr(self, name)
            check(0 <= value < float("inf"), name, value, "at least 0")
        check_choice("sampled", self.sampled, get_args(Sampled))
        if self.lookahead:
            reads = objective.target == "discounted_return"
            check(reads, "lookahead", self.lookahead, f"0 with target {objective.target}")
        else:
            alone = self.candidates is None
            check(alone, "candidates", str(self.candidates), "left out without lookahead")

    def facts(self) -> dict[str, Any]:
        """What was chosen; nothing where there is no head."""
        if not self.lookahead:
            return {}
        facts = {name: value for name, value in asdict(self).items() if name != "lookahead"}
        if self.candidates is None:
            return {"lookahead_weight": self.lookahead_weight, "sampled": self.sampled}
        return facts | {"candidates": self.candidates.name}


def places_of(batch: Batch) -> list[Places]:
    """Where the head is asked, and for which tokens: the sampled ones, and candidates if any."""
    next_places = sampled_places(batch["labels"], batch["position_ids"]) + 1
    places = [(next_places - 1, batch["input_ids"].flatten()[next_places, None])]
    if "candidate_ids" in batch:
        scored = scored_places(batch)
        places.append((scored, batch["candidate_ids"].flatten(0, 1)[scored]))
    return places


def sampled_places(labels: Tensor, position_ids: Tensor) -> Tensor:
    """(N,) labelled positions, counted through all B·T, whose next token has a label, too."""
    labelled = labels != NO_LABEL
    known = torch.zeros_like(labelled)
    goes_on = position_ids[:, 1:] == position_ids[:, :-1] + 1
    known[:, :-1] = labelled[:, :-1] & labelled[:, 1:] & goes_on
    return known.flatten().nonzero()[:, 0]


def scored_places(batch: Batch) -> Tensor:
    """(N,) positions with candidates, counted through all B·T."""
    return batch["candidate_shares"].sum(-1).flatten().nonzero()[:, 0]


def sampled_loss(
    z: Tensor, places: Tensor, targets: Tensor, batch: Batch, objective: Objective, readout: Readout
) -> Tensor:
    """Weighted sum over sampled tokens. z: (N, 1) after them; targets: (B, T) of the value."""
    parts = (targets, batch["is_cut"], batch["weights"])
    target, is_cut, weights = (part.flatten()[places + 1] for part in parts)
    return (losses_against(target, z[:, 0], is_cut, objective, readout) * weights).sum()


def candidate_losses(
    z: Tensor, teacher: Tensor, shares: Tensor, exponent: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(N,) of the mean, (N,) of the differences, from (N, K) logits and shares."""
    error = z.sigmoid() - teacher.sigmoid()
    mean = (shares * error).sum(-1, keepdim=True)
    weights = torch.where(shares > 0, shares**exponent, 0)
    within = (weights * (error - mean).square()).sum(-1) / weights.sum(-1)
    return mean[:, 0].square(), within
