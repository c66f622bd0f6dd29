"""What the plugin knows of one running request. No tensors here."""

import uuid
from dataclasses import dataclass, field

from lenvm_vllm.rails import Rails, rails_of
from lenvm_vllm.request import LengthTarget


@dataclass
class RequestState:
    """One request with a length target.

    output_ids: the engine's own list, which grows as tokens come. Under asynchronous
        scheduling its last entries may be -1: a token that is not known yet.
    eos_ids: tokens that end the completion.
    top_k, top_p, min_p: the request's own candidate cut; 0, 1.0 and 0.0 mean unset.
    sent: tokens of prompt and output that the value server has been told.
    """

    target: LengthTarget
    prompt_ids: list[int] | None
    output_ids: list[int]
    eos_ids: list[int]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    sent: int = 0
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    rails: Rails = field(init=False)

    def __post_init__(self) -> None:
        self.rails = rails_of(self.target)

    @property
    def generated(self) -> int:
        return len(self.output_ids)

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
