"""A completion between its guard rails: where an end is held back, and where it is forced."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lenvm_vllm.engine.completion import Completion, once_a_token
from lenvm_vllm.steering.constants import ANSWER_PART, LEAST
from lenvm_vllm.target.rails import Aim, Rails, aim_in_tokens, aim_of, bounds_of, rails_of
from lenvm_vllm.text.blocks import LONGEST_CLOSING
from lenvm_vllm.text.characters import LONGEST

if TYPE_CHECKING:
    from lenvm_vllm.text.counter import Counter

# Tokens that a character and the end of a code block take: further from a rail a text is free.
NEAR = LONGEST + LONGEST_CLOSING


@dataclass
class RailedText(Completion):
    _aim: tuple[int | None, Aim] | None = None  # of a target in tokens, before this wall
    _forced: tuple[int, list[int]] | None = None
    _gave_way: bool = False
    reserved: int = 0  # words or characters that what is open needs to be closed
    # Tokens of the completion from which on and up to which it is calm, and what is held there.
    _calm: tuple[int, float, list[int]] | None = None

    @once_a_token
    def aim(self) -> Aim:
        """What the text is led to, before the wall of `max_tokens`."""
        left = None if self.max_tokens is None else self.max_tokens - len(self.output_ids)
        # A thinking leaves an answer its room.
        wall = None if left is None else self.generated + left - LEAST * self._thinks
        if self.counter is not None:
            return self._aim_by_text(wall, self.counter)
        if self._aim is None or self._aim[0] != wall:  # most texts have one wall
            self._aim = wall, aim_of(self.target, wall)
        return self._aim[1]

    def _aim_by_text(self, wall: int | None, counter: "Counter") -> Aim:
        so_far, amount, ratio = self.generated, self.amount, counter.ratio
        return aim_in_tokens(
            self.target,
            self._limits,
            lambda limit: so_far + 1 + round((limit - amount) * ratio),
            wall,
        )

    @cached_property
    def _limits(self) -> tuple[int, int]:
        return self.target.limits

    @property
    def rails(self) -> Rails:
        return self.aim.rails

    @property
    def is_railed(self) -> bool:
        return self.target.tolerance is not None and self.target.mode != "tilt"

    @cached_property
    def bounds(self) -> Rails:
        """The rails in words or characters; none of a target in tokens."""
        return Rails() if self.counter is None else bounds_of(self.target)

    @once_a_token
    def room(self) -> int | None:
        """Words or characters that may come still; None where no rail limits them. A marker that
        is not whole takes some, as long as it may turn out to be text."""
        last = self.bounds.last
        if self.counter is None or last is None or not self.in_text:
            return None  # `in_text` has followed the text
        return last - self.counter.amount - self.reserved

    @once_a_token
    def is_limited(self) -> bool:
        """Whether the next token has to keep to what words or characters may come."""
        return self.counter is not None and self.is_railed and self.in_text

    @once_a_token
    def has_last_word(self) -> bool:
        """Whether no other word may begin: it could not be ended before the upper rail."""
        room = self.room
        if self.counter is None or room is None or self.held:
            return False
        return self.counter.has_last_word(room)

    @once_a_token
    def in_text(self) -> bool:
        return self.counts and not self._is_open

    @once_a_token
    def is_steered(self) -> bool:
        """Whether values may move the next token: not in a tool call, nor once one is whole,
        for then the model may well be done, and not where they would decide on a thinking."""
        decides = self.parts.unmarked and self.target.scope == "answer"
        return self.counts and not self.parts.calls and not decides

    @property
    def end_is_due(self) -> bool:
        """Whether a rail makes the next token one of `proper_ends`, or the next one of a marker
        that is its end."""
        if not self.counts:
            return False
        if self.counter is not None and self.counter.is_full(self.room):
            return True
        if not self._thinks:
            return not self._is_open and self.rails.forces(self.generated)
        begun = self.parts.closed
        full = begun > 0 and self.room is not None and self.room <= 0
        behind = len(self.markers.think_end) - begun - 1
        return full or self.rails.forces(self.generated + behind)

    @once_a_token
    def text_left(self) -> int | None:
        """Tokens that may come between the next one and the end that a rail forces; None where
        none does."""
        last = self.rails.last
        if last is None or not self.counts or self._is_open:
            return None
        ends = len(self.markers.think_end) if self._thinks else 1
        return last - ends - self.generated - 1

    @property
    def calm(self) -> list[int] | None:
        """`held` of a text in which no rail forces a token, nor will behind the next character and
        the end of a code block; None of any other. Most rows of most steps are so, from one rail to
        the next.

        Only of texts in which each token counts, so that their number tells where the rails are.
        """
        parts = self.parts
        counted = self.counter is None and self.target.scope == "completion"
        if not counted or parts.thinking or parts.called or self._forced is not None:
            return None
        tokens = len(self.output_ids)
        if self._calm is None or not self._calm[0] <= tokens < self._calm[1]:
            self._calm = tokens, self._calm_until(tokens), self.held
        return self._calm[2] if tokens < self._calm[1] else None

    def _calm_until(self, tokens: int) -> float:
        room = math.inf if self.text_left is None else self.text_left
        early = self.rails.first - self.generated - 1
        return tokens + min(room - NEAR + 1, early if early > 0 else math.inf)

    def force(self, in_character: bool = False, closing: list[int] | None = None) -> list[int]:
        """Tokens of which the next one must be one; empty where it is free.

        in_character: whether the text's last character is not whole; no marker is put into it.
        closing: what comes before any other, where something open has to close now.
        """
        closes = self._closes_thinking() and not in_character
        tokens = self._next_of_marker() if closes else []
        tokens = closing or (self.proper_ends if self.end_is_due else tokens)
        self._gave_way = self.gave_way
        self._forced = (len(self.output_ids), tokens) if tokens else None
        return tokens

    @property
    def gave_way(self) -> bool:
        """Whether a rail was due and its token did not come: a grammar had removed it."""
        limited = self.counter is not None and self.room is not None
        if limited and self.amount > (self.bounds.last or 0):
            return True
        if self._forced is None:
            return self._gave_way
        at, tokens = self._forced
        came = self.output_ids[at : at + 1]
        return self._gave_way or any(token not in (-1, *tokens) for token in came)

    @once_a_token
    def held(self) -> list[int]:
        """Ends that the next token must not be."""
        parts = self.parts
        if parts.in_call or parts.calls or not self.is_railed or not self.counts:
            return []
        if self._is_open:
            return self.eos_ids  # a text that ended here would have no answer
        if self.counter is not None:
            early = self.amount < self.bounds.first or bool(self.counter.pending)
        else:
            early = self.rails.suppresses(self.generated)
        return self.ends if early else []

    def _closes_thinking(self) -> bool:
        """Whether a thinking that does not count has to close now, to leave the answer its room:
        its lower rail, or where it has none a part of what it may have at most."""
        known = self._is_open or (self.target.scope == "answer" and self.parts.thinking)
        if not known or not self.is_railed:
            return False
        rails = rails_of(self.target)
        if self.target.scope == "answer":
            so_far, last, least = len(self.output_ids), self.max_tokens, rails.first
        elif self.bounds.last is not None:
            so_far, last, least = self.amount, self.bounds.last, 1
        else:
            so_far, last, least = self.generated, self.rails.last, 1
        if last is None:
            return False
        marker = len(self.markers.think_end) - self.parts.closed
        part = last if rails.last is None else min(last, rails.last)
        room = least if least > 1 else part // ANSWER_PART
        return so_far + marker + max(room, LEAST) >= last
