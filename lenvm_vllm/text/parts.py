"""The parts of a completion: thinkings, tool calls, and the text around them.

A thinking is what stands between its start and its end marker, both included. Where the start
marker is not known, a text that has not closed its thinking yet is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

# Of the models that mark a call by tokens of their own: start and end; "" where only the end of
# the text ends the calls.
_CALLS = (
    ("<tool_call>", "</tool_call>"),
    ("<|tool_call>", "<tool_call|>"),
    ("<tool_calls>", "</tool_calls>"),
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),  # noqa: RUF001
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ("<minimax:tool_call>", "</minimax:tool_call>"),
    ("<|tool_call_start|>", "<|tool_call_end|>"),
    ("<|tool_call|>", ""),
    ("<|python_tag|>", ""),
    ("[TOOL_CALLS]", ""),
)


@dataclass(frozen=True)
class Markers:
    """think_start, think_end: each a sequence of token ids; empty where it is not known.
    calls: start → end token of a tool call, None where only the end of the text ends it."""

    think_start: tuple[int, ...] = ()
    think_end: tuple[int, ...] = ()
    calls: dict[int, int | None] = field(default_factory=dict)

    @cached_property
    def longest(self) -> int:
        """Tokens of a marker of a thinking, at least one."""
        return max(len(self.think_start), len(self.think_end), 1)


def call_markers(tokenizer: Any) -> dict[int, int | None]:
    """Start → end token of the tool calls that a tokenizer has tokens for."""
    added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
    return {
        added[start]: added.get(end)
        for start, end in _CALLS
        if start in added and (not end or end in added)
    }


class Parts:
    """Follows a completion token by token.

    thinking: whether the next token belongs to a thinking. unmarked: whether nothing has told yet
    whether there will be one: its start marker may come first. calls: tool calls that are whole.
    thought, called: tokens of thinkings and of tool calls so far, markers included. begun: tokens
    before the part in which the next one stands.
    """

    def __init__(self, markers: Markers, turn: Sequence[int]) -> None:
        """turn: what the prompt holds of the turn that the completion belongs to."""
        self._markers = markers
        self._tail: list[int] = []
        self._call: tuple[int | None] | None = None
        self.followed = self.thought = self.called = self.calls = self.begun = 0
        start, end = _last(turn, markers.think_start), _last(turn, markers.think_end)
        self.thinking = bool(markers.think_end) and (
            start > end if markers.think_start else end < 0
        )
        self.unmarked = bool(markers.think_start) and start == end

    @property
    def in_call(self) -> bool:
        """Whether the next token belongs to a tool call."""
        return self._call is not None

    @property
    def closed(self) -> int:
        """Tokens of the end marker that the text ends with, fewer than all of them."""
        marker = self._markers.think_end
        fits = (n for n in range(len(marker) - 1, 0, -1) if self._ends_with(marker[:n]))
        return next(fits, 0)

    def follow(self, token: int) -> None:
        self.followed += 1
        self.unmarked, part = False, (self.thinking, self._call)
        self._tail = [*self._tail, token][-self._markers.longest :]
        if self._call is not None:
            self.called += 1
            if token == self._call[0]:
                self._call, self.calls = None, self.calls + 1
        elif self.thinking:
            self.thought += 1
            self.thinking = not self._ends_with(self._markers.think_end)
        elif self._ends_with(self._markers.think_start):
            self.thought += len(self._markers.think_start)
            self.thinking = True
        elif token in self._markers.calls:
            self.called += 1
            self._call = (self._markers.calls[token],)
        if (self.thinking, self._call) != part:
            self.begun = self.followed

    def _ends_with(self, marker: tuple[int, ...]) -> bool:
        return bool(marker) and tuple(self._tail[-len(marker) :]) == marker


def _last(ids: Sequence[int], marker: tuple[int, ...]) -> int:
    """Where the marker begins for the last time; -1 where it does not stand."""
    starts = range(len(ids) - len(marker), -1, -1)
    return next((i for i in starts if marker and tuple(ids[i : i + len(marker)]) == marker), -1)
