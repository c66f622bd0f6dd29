"""What the rows of a step want of their next token and of the text behind it.

Legend: B rows; all tensors float64 or bool, on the CPU. u as in policies.py.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from lenvm_vllm.steering.constants import LANDING_REACH, SENTENCE
from lenvm_vllm.steering.landing import Landing
from value_server.contract.values import value_from_length


@dataclass(frozen=True)
class Goals:
    """What each of B rows wants.

    exact, tilts, greedy: (B,) bool, the modes equal_to and tilt, and the policy.
    extreme: (B,) which value `greedy` always takes, whatever the text expects: -1 the smallest,
    of at_most, 1 the largest, of at_least; 0 none of them. railed: (B,) bool, rails are on.
    lowest: (B,) the fewest tokens that are to come behind the next one, negative past them; 0
    where any number will do. landing: of each row, in tokens from the next one; its target is the
    most that are to come. beta: (B,), of a tilt. max_kl: (B,) nats.
    """

    exact: Tensor
    tilts: Tensor
    greedy: Tensor
    extreme: Tensor
    railed: Tensor
    lowest: Tensor
    landing: Landing[Tensor]
    beta: Tensor
    max_kl: Tensor
    gamma: float

    def pick(self, rows: Tensor) -> "Goals":
        """Those of some rows, by their numbers."""
        mine = {name: getattr(self, name)[rows] for name in _OF_ROWS}
        landing = Landing(*(x[rows] for x in vars(self.landing).values()))
        return Goals(**mine, landing=landing, gamma=self.gamma)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """(B,) lowest and highest mean value that is all right."""
        low, high = (r.clamp(min=0) for r in (self.lowest, self.landing.target))
        return value_from_length(low, self.gamma), value_from_length(high, self.gamma)

    @cached_property
    def landed(self) -> Tensor:
        """(B,) share of the landing that is behind with the next token."""
        return self.landing.share(0)

    @cached_property
    def closing(self) -> Tensor:
        """(B,) as `landed`, of the token behind it: the next one may end the last sentence."""
        return self.landing.share(1)

    @cached_property
    def near_landing(self) -> Tensor:
        """(B,) bool: it opens within a sentence, or is open."""
        return self.landing.opens <= SENTENCE

    @cached_property
    def heeds_sentences(self) -> Tensor:
        """(B,) bool: whether the end of a sentence may be more or less likely than by itself."""
        return self.near_landing & (self.closing <= 1) & ~self.greedy

    @cached_property
    def reach(self) -> Tensor:
        """(B,) nats that the values may move the text in this step."""
        inside = self.exact & (self.landed >= 0) & (self.landed <= 1)
        return torch.where(inside, LANDING_REACH * self.max_kl, self.max_kl)

    @cached_property
    def lead_alone(self) -> Tensor:
        """(B,) bool: whether a row without values is steered, too: from near its landing on, and
        where an end would come too early."""
        return ~self.tilts & (self.near_landing | self.too_early | (self.exact & (self.landed < 0)))

    def without_values(self, alone: Tensor) -> "Goals":
        """The same, of which the rows `alone` (B,) bool have none: `project` leads them, and in
        the landing any end will do."""
        any_end = alone & self.exact & (self.landed >= 0)
        lowest = torch.where(any_end, self.lowest.clamp(max=0), self.lowest)
        return replace(self, lowest=lowest, greedy=self.greedy & ~alone)

    @cached_property
    def short(self) -> Tensor:
        """(B,) bool: an end now would be below the fewest of a limit or a range."""
        return ~self.exact & (self.lowest > 0)

    @cached_property
    def too_early(self) -> Tensor:
        """(B,) bool: the lower rail bars an end, whatever its value."""
        return self.short & self.railed


_OF_ROWS = [field.name for field in fields(Goals) if field.name not in ("landing", "gamma")]
