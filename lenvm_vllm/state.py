"""What the plugin knows of one running request. No tensors here."""

import math
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lenvm_vllm.rails import Rails, rails_of
from lenvm_vllm.request import LengthTarget

_CLOSED_BY_PROMPT = 4  # a chat template that switches thinking off ends with the marker, about

_BEYOND_THE_END = 3  # tokens

REQUEST_ID = "lenvm_request_id"  # key in `vllm_xargs`


def session_of(extra_args: Mapping[str, Any] | None) -> str:
    """A new session's id; it begins with the id that its request came with, if it had one."""
    given = (extra_args or {}).get(REQUEST_ID, "")
    known = re.sub(r"[^\w.:-]", "_", str(given), flags=re.ASCII)[:64]
    return f"{known}.{uuid.uuid4().hex}" if known else uuid.uuid4().hex


@dataclass
class RequestState:
    """One request with a length target.

    output_ids: the engine's own list, which grows as tokens come. Under asynchronous
        scheduling its last entries may be -1: a token that is not known yet.
    eos_ids: tokens that end the completion.
    marker_ids: tokens that end the thinking; needed by a scope other than the completion.
    top_k, top_p, min_p: the request's own candidate cut; 0, 1.0 and 0.0 mean unset.
    sent: tokens of prompt and output that the value server has been told.
    row: of the table that the API server reads, None where it reads none.
    valued: whether the values were there when they were last asked for.
    landing, forced, expected: of the last step that had values: whether ends were raised in it,
        whether it was made the end, and the tokens that were to come behind its token.
    steps, steered: so far, and those that values steered.
    """

    target: LengthTarget
    prompt_ids: list[int] | None
    output_ids: list[int]
    eos_ids: list[int]
    marker_ids: list[int] = field(default_factory=list)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    sent: int = 0
    row: int | None = None
    valued: bool = False
    landing: bool = False
    forced: bool = False
    expected: float = math.nan
    steps: int = 0
    steered: int = 0
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    rails: Rails = field(init=False)
    _searched: int = 0

    def __post_init__(self) -> None:
        self.rails = rails_of(self.target)

    @property
    def counts(self) -> bool:
        """Whether the next token is one of those that the target is about."""
        if self.target.scope == "completion":
            return True
        return (self._answer_start() is None) == (self.target.scope == "thinking")

    @property
    def generated(self) -> int:
        """Tokens so far of those that the target is about."""
        start = self._answer_start() if self.target.scope == "answer" else 0
        if start is None:
            return 0
        return self.target.prefix_tokens + len(self.output_ids) - start

    def outcome(self) -> tuple[int, int] | None:
        """(tokens, tokens that were wanted, the nearest of them); None where it did not end.

        vLLM may have run a finished request for a step more.
        """
        count = len(self.output_ids)
        tail = range(max(0, count - _BEYOND_THE_END), count)
        ended = [i for i in tail if self.output_ids[i] in self.eos_ids]
        start = 0 if self.target.scope == "completion" else self._answer_start()
        stop = start if self._thinks else (ended[0] + 1 if ended else None)
        if start is None or stop is None or self.target.mode == "tilt":
            return None
        tokens = stop if self._thinks else self.target.prefix_tokens + stop - start
        low, high = self.target.limits
        low = 0 if self.target.mode == "at_most" else low
        high = tokens if self.target.mode == "at_least" else high
        return tokens, min(max(tokens, low), max(low, high))

    @property
    def ends(self) -> list[int]:
        """Tokens after which no more are counted."""
        return [*self.marker_ids, *self.eos_ids] if self._thinks else self.eos_ids

    @property
    def proper_ends(self) -> list[int]:
        """Those of them that a guard rail may force."""
        return self.marker_ids if self._thinks else self.eos_ids

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
    def _thinks(self) -> bool:
        return self.target.scope == "thinking"

    def _answer_start(self) -> int | None:
        """Output tokens up to the marker, itself included; None while the thinking goes on."""
        if any(token in self.marker_ids for token in (self.prompt_ids or [])[-_CLOSED_BY_PROMPT:]):
            return 0
        while self._searched < len(self.output_ids):
            token = self.output_ids[self._searched]
            if token in self.marker_ids:
                return self._searched + 1  # stays here
            if token == -1:
                break
            self._searched += 1
        return None
