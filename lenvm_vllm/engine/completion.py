"""A completion as far as it has come, and how much it has of what its target counts."""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.text.parts import Markers, Parts

if TYPE_CHECKING:
    from lenvm_vllm.text.units import Counter


@dataclass
class Completion:
    """output_ids: the engine's own list, which grows as tokens come. Under asynchronous
        scheduling its last entries may be -1: a token that is not known yet.
    eos_ids: tokens that end the completion.
    markers: what divides the completion; needed by a scope other than the completion.
    counter: of words or characters, where the target is in one of them.
    """

    target: LengthTarget
    prompt_ids: list[int] | None
    output_ids: list[int]
    eos_ids: list[int]
    markers: Markers = field(default_factory=Markers)
    counter: "Counter | None" = None
    _parts: Parts | None = None
    # The counter before each of the last tokens, which may turn out to be a marker: its amount
    # and what restores it.
    _before: deque[tuple[int, tuple[Any, ...]]] = field(default_factory=deque)

    @property
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

    @property
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

    @property
    def amount(self) -> int:
        """So far of the target's unit, of which an end that is a token counts as one, and the
        marker that ends a thinking as nothing, also while it is not whole."""
        closed = self.parts.closed  # follows the text
        if self.counter is None:
            return self.generated
        begun = min(closed, len(self._before)) if self._thinks else 0
        return self._before[-begun][0] if begun else self.counter.amount

    @property
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

    @property
    def _thinks(self) -> bool:
        return self.target.scope == "thinking"

    def _turn(self) -> list[int]:
        """What the prompt holds of the turn that the completion belongs to."""
        prompt = self.prompt_ids or []
        ends = (i for i in range(len(prompt) - 1, -1, -1) if prompt[i] in self.eos_ids)
        return prompt[next(ends, -1) + 1 :]
