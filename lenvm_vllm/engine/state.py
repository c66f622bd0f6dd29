"""What the plugin knows of one running request. No tensors here."""

import math
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lenvm_vllm.engine.completion import once_a_token
from lenvm_vllm.engine.railed import RailedText
from lenvm_vllm.host.sampling import OwnSampling
from lenvm_vllm.target.request import MEDIA, REQUEST_ID, UNSEEN

if TYPE_CHECKING:
    from lenvm_vllm.steering.candidates import Cut


def session_of(extra_args: Mapping[str, Any] | None) -> str:
    """A new session's id; it begins with the id that its request came with, if it had one."""
    given = (extra_args or {}).get(REQUEST_ID, "")
    known = re.sub(r"[^\w.:-]", "_", str(given), flags=re.ASCII)[:64]
    return f"{known}.{uuid.uuid4().hex}" if known else uuid.uuid4().hex


def media_of(extra_args: Mapping[str, Any]) -> tuple[str, ...]:
    """What a request tells of its pictures, sounds and videos, as of `request.MEDIA`."""
    told = extra_args.get(MEDIA)
    return tuple(map(str, told)) if isinstance(told, list | tuple) else ()


@dataclass
class RequestState(RailedText):
    """One request with a length target.

    own: the request's own cut and penalties.
    sent: tokens of prompt and output that the value server has.
    again_at: when it is told again, on the clock `perf_counter`, if there was no room for it, or
        one of its pictures was not there; pause_s: how long that is, with pictures.
    refused: why the value server never has values for this text, if that is so.
    media: an entry for each picture, sound and video of its prompt, as of `request.MEDIA`.
    placeholders: tokens that stand for some in prompts of the served model.
    unseen: whether it goes without values since the value model does not see them.
    cut: of its candidates, once it is known; see `goals.py`.
    has_grammar: whether what it may write is bound by one.
    row: of the table that the API server reads, None where it reads none.
    valued: whether the values were there when they were last asked for; None as long as they
        were not.
    landing, forced, expected: of the last step that had values: whether ends were raised in it,
        whether it was made the end, and the tokens that were to come behind its token.
    steered: steps so far that values steered, the last of them at `steered_at` tokens.
    """

    temperature: float = 1.0
    own: OwnSampling = field(default_factory=OwnSampling)
    sent: int = 0
    again_at: float = 0.0
    pause_s: float = 0.0
    refused: str | None = None
    media: tuple[str, ...] = ()
    placeholders: frozenset[int] = frozenset()
    unseen: bool = False
    cut: "Cut | None" = None
    has_grammar: bool = False
    row: int | None = None
    valued: bool | None = None
    landing: bool = False
    forced: bool = False
    expected: float = math.nan
    steered: int = 0
    steered_at: int = -1
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    _searched: int = 0  # tokens of its prompt, for placeholders

    @once_a_token
    def is_known(self) -> bool:
        """Whether all of its tokens are known; of the last one that may be open for a while."""
        return not self.output_ids or self.output_ids[-1] != -1

    @once_a_token
    def has_turn(self) -> bool:
        """Whether its next token may be led: each `every` tokens it is."""
        led = self.is_steered and self.target.policy != "rails"
        return led and self.generated % self.target.every == 0

    @property
    def has_media(self) -> bool:
        """Whether its prompt is not text alone. What nobody told of is known by its placeholder."""
        prompt = self.prompt_ids or []
        if not self.media and self.placeholders and len(prompt) > self._searched:
            self._searched = len(prompt)
            if not self.placeholders.isdisjoint(prompt):
                self.media = (UNSEEN,)
        return bool(self.media)

    def unsent(self) -> list[int]:
        """Tokens from position `sent` on, as far as they are known."""
        prompt = self.prompt_ids or []
        start = len(prompt)
        if self.sent < start:
            tokens = prompt[self.sent :] + self.output_ids
        else:
            tokens = self.output_ids[self.sent - start :]
        return tokens[: tokens.index(-1)] if -1 in tokens else tokens
