"""How far a length is from what was asked for (paper, Eq. 17 and 18).

L: completion tokens, the end-of-sequence included, or words of the text. N: the target.
d = (L - N) / N.
"""

import math

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
