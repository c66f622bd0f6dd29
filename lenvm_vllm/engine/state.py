"""What the plugin knows of one running request. No tensors here."""

import math
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lenvm_vllm.engine.completion import Completion
from lenvm_vllm.host.sampling import OwnSampling
from lenvm_vllm.target.rails import LEAST, Aim, Rails, aim_in_tokens, aim_of, bounds_of, rails_of
from lenvm_vllm.target.request import REQUEST_ID

_BEYOND_THE_END = 3  # tokens


def session_of(extra_args: Mapping[str, Any] | None) -> str:
    """A new session's id; it begins with the id that its request came with, if it had one."""
    given = (extra_args or {}).get(REQUEST_ID, "")
    known = re.sub(r"[^\w.:-]", "_", str(given), flags=re.ASCII)[:64]
    return f"{known}.{uuid.uuid4().hex}" if known else uuid.uuid4().hex


@dataclass
class RequestState(Completion):
    """One request with a length target.

    max_tokens: the most that the engine lets the completion have.
    own: the request's own cut and penalties.
    sent: tokens of prompt and output that the value server has been told.
    row: of the table that the API server reads, None where it reads none.
    valued: whether the values were there when they were last asked for.
    landing, forced, expected: of the last step that had values: whether ends were raised in it,
        whether it was made the end, and the tokens that were to come behind its token.
    steps, steered: so far, and those that values steered.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    own: OwnSampling = field(default_factory=OwnSampling)
    sent: int = 0
    row: int | None = None
    valued: bool = False
    landing: bool = False
    forced: bool = False
    expected: float = math.nan
    steps: int = 0
    steered: int = 0
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    _aim: tuple[tuple[int | None, int], Aim] | None = None
    _forced: tuple[int, list[int]] | None = None
    _gave_way: bool = False

    @cached_property
    def bounds(self) -> Rails:
        """The rails in words or characters; none of a target in tokens."""
        return Rails() if self.counter is None else bounds_of(self.target)

    @property
    def room(self) -> int | None:
        """Words or characters that may come still; None where no rail limits them. A marker that
        is not whole takes some, as long as it may turn out to be text."""
        last = self.bounds.last
        if self.counter is None or last is None or not self._in_text:
            return None  # `_in_text` has followed the text
        return last - self.counter.amount

    @property
    def is_limited(self) -> bool:
        """Whether the next token has to keep to what words or characters may come."""
        return self.counter is not None and self.is_railed and self._in_text

    @property
    def has_last_word(self) -> bool:
        """Whether no other word may begin: it could not be ended before the upper rail."""
        room = self.room
        if self.counter is None or room is None or self.held:
            return False
        return self.counter.has_last_word(room)

    @property
    def _in_text(self) -> bool:
        return self.counts and not self._is_open

    @property
    def aim(self) -> Aim:
        """What the text is led to, before the wall of `max_tokens`."""
        left = None if self.max_tokens is None else self.max_tokens - len(self.output_ids)
        # A thinking leaves an answer its room.
        wall = None if left is None else self.generated + left - LEAST * self._thinks
        known = wall, 0 if self.counter is None else self.generated
        if self._aim is None or self._aim[0] != known:
            self._aim = known, self._find_aim(wall)
        return self._aim[1]

    def _find_aim(self, wall: int | None) -> Aim:
        if self.counter is None:
            return aim_of(self.target, wall)
        so_far, amount, ratio = self.generated, self.amount, self.counter.ratio
        return aim_in_tokens(
            self.target, lambda limit: so_far + 1 + round((limit - amount) * ratio), wall
        )

    @property
    def rails(self) -> Rails:
        return self.aim.rails

    @property
    def is_railed(self) -> bool:
        return self.target.tolerance is not None and self.target.mode != "tilt"

    @property
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
        if self._thinks and self.parts.closed and self.room is not None and self.room <= 0:
            return True
        if not self._thinks:
            return not self._is_open and self.rails.forces(self.generated)
        behind = len(self.markers.think_end) - self.parts.closed - 1
        return self.rails.forces(self.generated + behind)

    @property
    def text_left(self) -> int | None:
        """Tokens that may come between the next one and the end that a rail forces; None where
        none does."""
        last = self.rails.last
        if last is None or not self.counts or self._is_open:
            return None
        ends = len(self.markers.think_end) if self._thinks else 1
        return last - ends - self.generated - 1

    def force(self, in_character: bool = False) -> list[int]:
        """Tokens of which the next one must be one; empty where it is free.

        in_character: whether the text's last character is not whole; no marker is put into it.
        """
        closes = self._closes_thinking() and not in_character
        tokens = self._next_of_marker() if closes else []
        tokens = self.proper_ends if self.end_is_due else tokens
        self._gave_way = self.gave_way
        self._forced = (len(self.output_ids), tokens) if tokens else None
        return tokens

    @property
    def gave_way(self) -> bool:
        """Whether a rail was due and its token did not come: a grammar had removed it."""
        if self.room is not None and self.amount > (self.bounds.last or 0):
            return True
        at, tokens = self._forced or (0, [])
        came = self.output_ids[at : at + 1] if tokens else []
        return self._gave_way or any(token not in (-1, *tokens) for token in came)

    @property
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

    def outcome(self) -> tuple[int, int] | None:
        """(amount, amount that was wanted, the nearest of them); None where it did not end.

        vLLM may have run a finished request for a step more.
        """
        count = len(self.output_ids)
        tail = range(max(0, count - _BEYOND_THE_END), count)
        ended = [i for i in tail if self.output_ids[i] in self.eos_ids]
        parts = self.parts
        over = bool(ended)
        if self._thinks:
            over = not parts.thinking and parts.thought > 0
        elif self.target.scope == "answer":
            over = over and not parts.thinking
        if not over or self.target.mode == "tilt":
            return None
        beyond = 0 if self._thinks or self.counter is not None else count - ended[0] - 1
        amount = self.amount - beyond
        low, high = self.target.limits
        low = 0 if self.target.mode == "at_most" else low
        high = amount if self.target.mode == "at_least" else high
        return amount, min(max(amount, low), max(low, high))

    @property
    def is_over(self) -> bool:
        """Whether its text has ended, as far as its tokens tell."""
        tail = self.output_ids[-_BEYOND_THE_END:]
        return any(token in self.eos_ids for token in tail) or (
            self.max_tokens is not None and len(self.output_ids) >= self.max_tokens
        )

    @property
    def ends(self) -> list[int]:
        """Tokens after which no more are counted."""
        if not self._thinks:
            return self.eos_ids
        marker = self.markers.think_end
        whole = marker[-1:] if self.parts.closed == len(marker) - 1 else ()
        return [*whole, *self.eos_ids]

    @property
    def proper_ends(self) -> list[int]:
        """Those of them that a guard rail may force; of a marker of several the next token."""
        return self._next_of_marker() if self._thinks else self.eos_ids

    @property
    def length(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt_ids or ()) + len(self.output_ids)

    def unsent(self) -> list[int] | None:
        """Tokens from position `sent` on; None while they cannot be told."""
        if self.prompt_ids is None:
            return None
        start = len(self.prompt_ids)
        if self.sent < start:
            tokens = self.prompt_ids[self.sent :] + self.output_ids
        else:
            tokens = self.output_ids[self.sent - start :]
        return None if -1 in tokens else tokens

    @property
    def _is_open(self) -> bool:
        """Whether the text is in a thinking that is not what is counted: known by its start."""
        return self.parts.thinking and not self._thinks and bool(self.markers.think_start)

    def _next_of_marker(self) -> list[int]:
        return [self.markers.think_end[self.parts.closed]]

    def _closes_thinking(self) -> bool:
        """Whether a thinking that does not count has to close now, to leave the answer its room:
        its lower rail, or where it has none a quarter of what it may have at most."""
        known = self._is_open or (self.target.scope == "answer" and self.parts.thinking)
        if not known or not self.is_railed:
            return False
        rails = rails_of(self.target)
        last, first, so_far = self.max_tokens, rails.first, len(self.output_ids)
        if self.target.scope == "completion":
            last, first, so_far = self.rails.last, 1, self.generated
            if self.bounds.last is not None:
                last, so_far = self.bounds.last, self.amount
        if last is None:
            return False
        marker = len(self.markers.think_end) - self.parts.closed
        part = last if rails.last is None else min(last, rails.last)
        room = first if first > 1 else part // 4
        return so_far + marker + max(room, LEAST) >= last
