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
from functools import cached_property

from lenvm_vllm.steering.constants import DEFAULT_TOLERANCE, LEAST, SHORTEST_LANDING
from lenvm_vllm.steering.landing import NEVER, Landing, landing_of
from lenvm_vllm.target.request import LengthTarget
from value_server.contract.units import CHARACTERS, UNITS, WORDS

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


_NO_RAILS = Rails()


@dataclass(frozen=True)
class Aim:
    """What a text is led to: its target, or as much of it as stands before a wall.

    low, high: the fewest and the most tokens that are wanted. width: w of the landing, in tokens.
    """

    mode: str
    low: int
    high: int
    width: float
    rails: Rails

    # A text in tokens has one aim for as long as it lives.

    @cached_property
    def numbers(self) -> tuple[float, ...]:
        """1.0 of equal_to and of tilt, else 0; fewest, and target, before and behind of the
        landing."""
        landing, fewest = self.landing, float(self.fewest)
        exact, tilts = self.mode == "equal_to", self.mode == "tilt"
        return exact, tilts, fewest, landing.target, landing.before, landing.behind

    @property
    def fewest(self) -> int:
        """As `low`; 0 of a mode that has no least."""
        return 0 if self.mode in ("at_most", "tilt") else self.low

    @cached_property
    def landing(self) -> Landing[float]:
        landing = landing_of(self.mode, self.high, self.width)
        if self.mode != "equal_to" or self.rails.first <= 1:  # a wall alone holds no end back
            return landing
        return replace(landing, before=max(landing.before, SHORTEST_LANDING - landing.behind))


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
    return _rails_around(low, target.tolerance)


def _rails_around(length: int, tolerance: float) -> Rails:
    width = width_of(length, tolerance)
    return Rails(first=max(1, math.ceil(length - width)), last=math.floor(length + width))


def width_of(length: int, tolerance: float) -> Fraction:
    """Units by which a text may miss `length`."""
    # The decimal that was written, not its binary neighbour: 100 * (1 - 0.07) is 93.
    return Fraction(str(tolerance)) * length


def needed_by(target: LengthTarget) -> Rails:
    """The rails in tokens, of a target in another unit those that no text of it can break."""
    if target.unit == UNITS[0]:
        return rails_of(target)
    return Rails(max(1, -(-bounds_of(target).first // MOST_A_TOKEN[target.unit])))


def aim_of(target: LengthTarget, wall: int | None = None) -> Aim:
    """wall: number of the last token that the text can have, whatever its target says.

    The end comes before it, and so does the whole landing: equal_to aims at the same place
    between its lower rail and the wall as between its rails, at_least becomes a range.
    """
    mode, tolerance = _mode_of(target)
    return _aim(mode, *target.limits, tolerance, rails_of(target), wall)


def _mode_of(target: LengthTarget) -> tuple[str, float | None]:
    """Mode and tolerance; a range of one length is as `equal_to` with a tolerance of 0."""
    low, high = target.limits
    if target.mode == "range" and low == high:
        return "equal_to", None if target.tolerance is None else 0.0
    return target.mode, target.tolerance


def _aim(
    mode: str, low: int, high: int, tolerance: float | None, rails: Rails, wall: int | None
) -> Aim:
    share = tolerance if mode == "equal_to" else None
    share = DEFAULT_TOLERANCE if share is None else share
    aim = Aim(mode, low, high, share * high, rails)
    if wall is None or wall < LEAST or mode == "tilt":
        return aim
    if mode == "equal_to":
        far = wall > high + share * high + 1  # saves the fractions, of most texts
        return aim if far else _before(aim, _rails_around(low, share), wall)
    if mode != "at_least" and high <= wall:
        return aim
    mode = "range" if mode == "at_least" else mode
    if tolerance is not None:
        rails = Rails(min(rails.first, wall), wall)
    return Aim(mode, min(low, wall), wall, DEFAULT_TOLERANCE * wall, rails)


def _before(aim: Aim, whole: Rails, wall: int) -> Aim:
    """The aim of equal_to before a wall. whole: its rails, also where they are off."""
    if whole.last is None or wall >= whole.last:
        return aim
    first = min(whole.first, wall)
    part = Fraction(aim.low - whole.first, max(1, whole.last - whole.first))
    tokens = first + round(part * (wall - first))
    rails = aim.rails if aim.rails.last is None else Rails(first, wall)
    return Aim(aim.mode, tokens, tokens, float(wall - tokens), rails)


def aim_in_tokens(
    target: LengthTarget, limits: tuple[int, int], tokens: Callable[[int], int], wall: int | None
) -> Aim:
    """The aim in tokens of a target in another unit, whose only rail in tokens is the wall.

    limits: of the target. tokens: of a text that has so much of its unit, the end included. wall:
    as of `aim_of`.
    """
    (low, high), (mode, tolerance) = map(tokens, limits), _mode_of(target)
    aim = _aim(mode, low, high, tolerance, _NO_RAILS, wall)
    walled = target.tolerance is not None and wall is not None and wall >= LEAST
    rails = Rails(last=wall) if walled else _NO_RAILS
    return Aim(aim.mode, aim.low, aim.high, aim.width, rails)


def landing_before(target: LengthTarget, wall: int | None) -> Landing[float]:
    """Where, in the target's unit, its end may be brought about.

    wall: as of `aim_of`; of a target in another unit it is left out.
    """
    return aim_of(target, wall if target.unit == UNITS[0] else None).landing


def landing_span(target: LengthTarget) -> tuple[float, float] | None:
    """Amounts of the target's unit between which an end is brought about; None where none is."""
    landing = aim_of(target).landing
    if landing is NEVER or target.policy in ("greedy", "rails"):
        return None
    return landing.opens, landing.closes
