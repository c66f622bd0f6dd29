"""A completion as far as it has come, and how much it has of what its target counts."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.text.parts import Markers, Parts

if TYPE_CHECKING:
    from lenvm_vllm.text.counter import Counter

_BEYOND_THE_END = 3  # tokens that vLLM may run a finished request for
T = TypeVar("T")


class once_a_token(Generic[T]):  # noqa: N801 - as `property`
    """A property of a text that is found once between two tokens, though a step asks for it many
    times: it stays as it was found until `Completion.renew`."""

    names: ClassVar[list[str]] = []

    def __init__(self, find: Callable[[Any], T]) -> None:
        self._find = find
        self.names.append(find.__name__)

    def __get__(self, text: Any, owner: Any = None) -> T:
        # Found there, it is read without this function.
        found = text.__dict__[self._find.__name__] = self._find(text)
        return found


@dataclass
class Completion:
    """output_ids: the engine's own list, which grows as tokens come. Under asynchronous
        scheduling its last entries may be -1: a token that is not known yet.
    eos_ids: tokens that end the completion.
    markers: what divides the completion; needed by a scope other than the completion.
    counter: of words or characters, where the target is in one of them.
    max_tokens: the most that the engine lets the completion have.
    """

    target: LengthTarget
    prompt_ids: list[int] | None
    output_ids: list[int]
    eos_ids: list[int]
    markers: Markers = field(default_factory=Markers)
    counter: "Counter | None" = None
    max_tokens: int | None = None
    _parts: Parts | None = None
    _renewed_at: int = -1  # tokens
    # The counter before each of the last tokens, which may turn out to be a marker: its amount
    # and what restores it.
    _before: deque[tuple[int, tuple[Any, ...]]] = field(default_factory=deque)

    def renew(self) -> None:
        """To be called before each use of the text in which it may have another token, or know
        one that was not known yet, or have begun anew."""
        count = len(self.output_ids)
        if count != self._renewed_at or (self._parts and self._parts.followed) != count:
            self._renewed_at = count
            for name in once_a_token.names:
                self.__dict__.pop(name, None)

    @once_a_token
    def parts(self) -> Parts:
        """The parts of the completion, as far as its tokens are known."""
        parts = self._parts
        if parts is None or parts.followed > len(self.output_ids):
            self._parts = parts = Parts(self.markers, self._turn())
            self._begin_count()
        for token in self.output_ids[parts.followed :]:
            if token == -1:
                break
            counts, thinking = self._counts(parts), parts.thinking
            parts.follow(token)
            if self.counter is not None:
                if counts:
                    self._count(token, self.counter)
                if parts.thinking != thinking:
                    self._begin_part(parts, self.counter, counts)
        return parts

    @once_a_token
    def counts(self) -> bool:
        """Whether the next token is one of those that the target is about."""
        return self._counts(self.parts)

    def _counts(self, parts: Parts) -> bool:
        scope = self.target.scope
        return not parts.in_call and (
            scope == "completion" or parts.thinking == (scope == "thinking")
        )

    def _count(self, token: int, counter: "Counter") -> None:
        if token in self.eos_ids:
            counter.over = True
        elif not counter.over:  # vLLM may run a finished request for a step more
            self._before.append((counter.amount, counter.saved))
            counter.follow(token)

    def _begin_part(self, parts: Parts, counter: "Counter", counted: bool) -> None:
        """Behind a marker, which is no text, though until it was whole it counted as some."""
        marker = self.markers.think_start if parts.thinking else self.markers.think_end
        if counted and self._before and not counter.over:
            counter.restore(self._before[max(-len(marker), -len(self._before))][1])
        counter.part()

    def _begin_count(self) -> None:
        """Of words or characters, with what the prompt has of the completion."""
        self._before = deque(maxlen=self.markers.longest)
        if self.counter is not None:
            prompt = self.prompt_ids or []
            split = max(0, len(prompt) - self.target.prefix_tokens)
            self.counter.restart(prompt[:split])
            for token in prompt[split:]:
                self.counter.follow(token)

    @once_a_token
    def amount(self) -> int:
        """So far of the target's unit, of which an end that is a token counts as one, and the
        marker that ends a thinking as nothing, also while it is not whole."""
        closed = self.parts.closed  # follows the text
        if self.counter is None:
            return self.generated
        begun = min(closed, len(self._before)) if self._thinks else 0
        return self._before[-begun][0] if begun else self.counter.amount

    @once_a_token
    def generated(self) -> int:
        """Tokens so far of those that the target is about."""
        parts = self.parts
        unknown = len(self.output_ids) - parts.followed
        if self._thinks:
            return parts.thought + (unknown if parts.thinking else 0)
        if self.target.scope == "answer":
            text = parts.followed - parts.thought - parts.called
            return text + (0 if parts.thinking or parts.in_call else unknown)
        return self.target.prefix_tokens + len(self.output_ids) - parts.called

    @once_a_token
    def written(self) -> list[int]:
        """What the next token goes on with: the completion with what the prompt has of it, or what
        stands behind its last thinking or tool call."""
        if begun := self.parts.begun:
            return self.output_ids[begun:]
        prefix = self.target.prefix_tokens
        return [*(self.prompt_ids or [])[-prefix:], *self.output_ids] if prefix else self.output_ids

    @property
    def _thinks(self) -> bool:
        return self.target.scope == "thinking"

    @property
    def length(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt_ids or ()) + len(self.output_ids)

    @property
    def is_over(self) -> bool:
        """Whether its text has ended, as far as its tokens tell."""
        tail = self.output_ids[-_BEYOND_THE_END:]
        return any(token in self.eos_ids for token in tail) or (
            self.max_tokens is not None and len(self.output_ids) >= self.max_tokens
        )

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

    @once_a_token
    def ends(self) -> list[int]:
        """Tokens after which no more are counted."""
        if not self._thinks:
            return self.eos_ids
        marker = self.markers.think_end
        whole = marker[-1:] if self.parts.closed == len(marker) - 1 else ()
        return [*whole, *self.eos_ids]

    @once_a_token
    def proper_ends(self) -> list[int]:
        """Those of them that a guard rail may force; of a marker of several the next token."""
        return self._next_of_marker() if self._thinks else self.eos_ids

    @property
    def _is_open(self) -> bool:
        """Whether the text is in a thinking that is not what is counted: known by its start."""
        return self.parts.thinking and not self._thinks and bool(self.markers.think_start)

    def _next_of_marker(self) -> list[int]:
        return [self.markers.think_end[self.parts.closed]]

    def _turn(self) -> list[int]:
        """What the prompt holds of the turn that the completion belongs to."""
        prompt = self.prompt_ids or []
        ends = (i for i in range(len(prompt) - 1, -1, -1) if prompt[i] in self.eos_ids)
        return prompt[next(ends, -1) + 1 :]
