"""Guard rails: where end-of-sequence may and must stand. Exact, and without a model.

Tokens are numbered from 1 and the end-of-sequence token is itself one of them, so that the
number of the last token is `usage.completion_tokens`:

    1 ........ first ........ last
    [no end   ) [end allowed ) end forced
"""

import math
from dataclasses import dataclass
from fractions import Fraction

from lenvm_vllm.request import DEFAULT_TOLERANCE, LengthTarget, LengthTargetError


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


def rails_of(target: LengthTarget) -> Rails:
    """The rails of a target; a tilt and `tolerance` None have none."""
    if target.mode == "tilt" or target.tolerance is None:
        return Rails()
    low, high = target.limits
    if target.mode == "range":
        return Rails(low, high)
    if target.mode == "at_least":
        return Rails(first=low)
    if target.mode == "at_most":
        return Rails(last=high)
    # The decimal that was written, not its binary neighbour: 100 * (1 - 0.07) is 93.
    width = Fraction(str(target.tolerance)) * low
    first, last = math.ceil(low - width), math.floor(low + width)
    return Rails(first=max(1, first), last=last)


def landing_of(target: LengthTarget) -> float:
    """Tokens w of the landing: of equal_to those behind the target, of a limit half of all.

    Of equal_to it is what the rails allow, or would by default.
    """
    tolerance = target.tolerance if target.mode == "equal_to" else None
    share = DEFAULT_TOLERANCE if tolerance is None else tolerance
    return share * target.limits[1]


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
    if rails.last is not None and min_tokens >= rails.last:
        raise LengthTargetError(
            f"min_tokens: {min_tokens} tokens before the end contradict length_target, whose "
            f"completion has at most {rails.last} tokens, the end included"
        )
