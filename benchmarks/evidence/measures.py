"""What is measured of one text: how far its length is off, how it ends, how it repeats itself.

L: completion tokens, the end-of-sequence included, or words of the text. N: the target.
d = (L - N) / N (paper, Eq. 17 and 18).
"""

import math
from collections.abc import Container, Sequence

from lenvm_vllm.steering.constants import NATURAL

MODES = ("equal_to", "at_most", "at_least")
TOO_SHORT, TOO_LONG = 5.0, 2.0  # how fast the score falls on either side


def deviation(length: int, target: int) -> float:
    """|L - N| / N in percent, Eq. 17; its mean is LD."""
    return 100 * abs(length - target) / target


def score(length: int, target: int, mode: str) -> float:
    """100 on target, 100·exp(5d) below it, 100·exp(-2d) above, Eq. 18; its mean is LS.

    at_most counts what is above alone, at_least what is below.
    """
    d = (length - target) / target
    if d < 0:
        return 100.0 if mode == "at_most" else 100 * math.exp(TOO_SHORT * d)
    return 100.0 if mode == "at_least" else 100 * math.exp(-TOO_LONG * d)


def ends_naturally(finish: str, length: int, lasts: Container[int], p_end: float) -> bool:
    """Whether the model finished by itself.

    lasts: numbers of the tokens that a guard rail makes the end. p_end: the unguided model's
    probability of an end at that place.
    """
    return finish == "stop" and length not in lasts and p_end >= NATURAL


def distinct(ids: Sequence[int], n: int) -> float:
    """Different n-grams of a text over all its n-grams; 1 in a text without any."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(ids: Sequence[int]) -> float:
    """Share of the 4-grams that stood in the text before."""
    return 1 - distinct(ids, 4)
