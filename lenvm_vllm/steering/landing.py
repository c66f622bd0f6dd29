"""The landing: the last stretch of a text, the only one in which an end is made likelier.

Before it the text has time to find a better end, and many small chances of an early one would
add up to it.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from lenvm_vllm.steering.constants import (
    LANDING_BEFORE_LIMIT,
    LANDING_BEFORE_TARGET,
    LANDING_NATS,
    SENTENCE_LEAD,
    SENTENCE_RISE,
)

if TYPE_CHECKING:
    from torch import Tensor

Tokens = TypeVar("Tokens", float, "Tensor")

_NO_WIDTH = 1e-100  # is divided by in place of 0


@dataclass(frozen=True)
class Landing(Generic[Tokens]):
    """Where it opens, its target, and where it closes. w: its width (`target/rails.py`, `Aim`).

        equal_to         N - w/2 ...... N ............ N + w
        at_most, range   N - 2w ...................... N       (N: the highest)
                         opens          target         closes
        share            0 ........................... 1
        end              [may be brought about, ever likelier ] comes if it is possible

    target: a place in the text, counted in tokens, words or characters from anywhere.
    before, behind: its distance from where the landing opens, and to where it closes.

    The numbers of one text, or tensors (B,) of the rows of a step, in tokens from the next one.
    """

    target: Tokens
    before: Tokens
    behind: Tokens

    @property
    def opens(self) -> Tokens:
        return self.closes - self.length

    @property
    def closes(self) -> Tokens:
        return self.target + self.behind

    @property
    def length(self) -> Tokens:
        return self.before + self.behind

    def share(self, place: float) -> Tokens:
        """How much of it is behind a text that ends at `place`: below 0 before it opens."""
        return 1 - (self.closes - place) / (self.length + _NO_WIDTH)


def sentence_gain(closing: Tokens) -> Tokens:
    """Nats that the odds of the end of a sentence gain. closing: `share` of the token behind it."""
    return LANDING_NATS * (SENTENCE_LEAD + SENTENCE_RISE * closing)


NEVER: Landing[float] = Landing(math.inf, 0.0, 0.0)


def landing_of(mode: str, target: float, width: float) -> Landing[float]:
    """width: w. NEVER of a mode that brings no end about."""
    if mode in ("at_least", "tilt"):
        return NEVER
    if mode == "equal_to":
        return Landing(target, LANDING_BEFORE_TARGET * width, width)
    return Landing(target, LANDING_BEFORE_LIMIT * width, 0.0)
