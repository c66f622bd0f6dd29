"""Guard rails: where end-of-sequence may and must stand. Exact, and without a model.

Tokens are numbered from 1 and the end-of-sequence token is itself one of them, so that the
number of the last token is `usage.completion_tokens`:

    1 ........ first ........ last
    [no end   ) [end allowed ) end forced

Words and characters are counted without it, see `bounds_of`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

from lenvm_vllm.target.request import DEFAULT_TOLERANCE, LengthTarget, LengthTargetError
from value_server.contract.units import CHARACTERS, UNITS, WORDS

LEAST = 2  # tokens of a text: a word and the end
EARLY = 0.5  # of w, that the landing of equal_to begins before its target
TWICE = 2.0  # w: the landing of a limit, which is behind it
# Units of a text that one of its tokens can hold in the mean; the most of any script and more.
MOST_A_TOKEN = {WORDS: 4, CHARACTERS: 16}


@dataclass(frozen=True)
class Rails:
    """first: number of the first token that may be the end.
    last: number of the token that must be the end; None: no upper rail."""

    first: int = 1
    last: int | None = None

    def suppresses(self, generated: int) -> bool:
        """Whether the token after `generated` ones must not be the end."""
        return generated + 1 < self.first

    def forces(self, generated: int) -> bool:
        """Whether the token after `generated` ones must be the end."""
        return self.last is not None and generated + 1 >= self.last

    def behind(self, tokens: int) -> "Rails":
        """The same rails for what is left of a completion behind its first `tokens`."""
        return Rails(max(1, self.first - tokens), self.last and self.last - tokens)


@dataclass(frozen=True)
class Aim:
    """What a text is led to: its target, or as much of it as stands before a wall.

    low, high: the fewest and the most tokens that are wanted. landing: tokens w of the landing,
    of equal_to those behind the target, of a limit half of all.
    """

    mode: str
    low: int
    high: int
    landing: float
    rails: Rails


def rails_of(target: LengthTarget) -> Rails:
    """The rails in tokens of a target; one in another unit has none."""
    return bounds_of(target) if target.unit == UNITS[0] else Rails()


def bounds_of(target: LengthTarget) -> Rails:
    """The rails of a target in its own unit; a tilt and `tolerance` None have none.

    Of words and characters they are the fewest and the most of the whole text, whose end is
    none of them.
    """
    counts_end = target.unit == UNITS[0]
    if target.mode == "tilt" or target.tolerance is None:
        return Rails()
    low, high = target.limits
    if target.mode == "range":
        return Rails(low, high)
    if target.mode == "at_least":
        return Rails(first=low)
    if target.mode == "at_most":
        return Rails(int(counts_end), high)
    # The decimal that was written, not its binary neighbour: 100 * (1 - 0.07) is 93.
    width = Fraction(str(target.tolerance)) * low
    first, last = math.ceil(low - width), math.floor(low + width)
    return Rails(first=max(1, first), last=last)


def needed_by(target: LengthTarget) -> Rails:
    """The rails in tokens, of a target in another unit those that no text of it can break."""
    if target.unit == UNITS[0]:
        return rails_of(target)
    return Rails(max(1, -(-bounds_of(target).first // MOST_A_TOKEN[target.unit])))


def aim_of(target: LengthTarget, wall: int | None = None) -> Aim:
    """wall: number of the last token that the text can have, whatever its target says.

    The end comes before it, and so does the whole landing: equal_to aims at the same place
    between its lower rail and the wall as between its rails.
    """
    low, high = target.limits
    share = target.tolerance if target.mode == "equal_to" else DEFAULT_TOLERANCE
    share = DEFAULT_TOLERANCE if share is None else share
    aim = Aim(target.mode, low, high, share * high, rails_of(target))
    if wall is None or wall < LEAST or target.mode == "tilt":
        return aim
    if target.mode == "equal_to":
        return _before(aim, target.model_copy(update={"tolerance": share}), wall)
    if target.mode != "at_least" and high <= wall:
        return aim
    first = min(aim.rails.first, wall)
    return Aim(
        "range" if target.mode == "at_least" else target.mode,
        min(low, wall),
        wall,
        DEFAULT_TOLERANCE * wall,
        aim.rails if target.tolerance is None else Rails(first, wall),
    )


def _before(aim: Aim, railed: LengthTarget, wall: int) -> Aim:
    """The aim of equal_to before a wall; railed: its target, with rails."""
    whole = rails_of(railed)
    assert whole.last is not None
    if wall >= whole.last:
        return aim
    first = min(whole.first, wall)
    part = Fraction(aim.low - whole.first, max(1, whole.last - whole.first))
    tokens = first + round(part * (wall - first))
    rails = aim.rails if aim.rails.last is None else Rails(first, wall)
    return replace(aim, low=tokens, high=tokens, landing=float(wall - tokens), rails=rails)


def aim_in_tokens(target: LengthTarget, tokens: Callable[[int], int], wall: int | None) -> Aim:
    """The aim in tokens of a target in another unit, whose only rail in tokens is the wall.

    tokens: of a text that has so much of its unit, the end included. wall: as of `aim_of`.
    """
    aim = aim_of(target.in_tokens(tokens), wall)
    walled = target.tolerance is not None and wall is not None and wall >= LEAST
    return replace(aim, rails=Rails(last=wall if walled else None))


def landing_span(target: LengthTarget) -> tuple[float, float] | None:
    """Amounts of the target's unit between which an end is brought about; None where none is."""
    if target.mode in ("at_least", "tilt") or target.policy == "greedy":
        return None
    aim = aim_of(target)
    if target.mode == "equal_to":
        return aim.high - EARLY * aim.landing, aim.high + aim.landing
    return aim.high - TWICE * aim.landing, aim.high


def check_limits(rails: Rails, max_tokens: int | None, min_tokens: int, ignore_eos: bool) -> None:
    """Raises LengthTargetError when the request's other fields contradict its rails."""
    if ignore_eos:
        raise LengthTargetError("ignore_eos: true contradicts length_target")
    if max_tokens is not None and max_tokens < rails.first:
        raise LengthTargetError(
            f"max_tokens: {max_tokens} contradicts length_target, whose completion has at "
            f"least {rails.first} tokens"
        )
    # vLLM counts the tokens before the end.
    if rails.last is not None and min_tokens >= max(1, rails.last):
        raise LengthTargetError(
            f"min_tokens: {min_tokens} tokens before the end contradict length_target, whose "
            f"completion has at most {rails.last} tokens, the end included"
        )
