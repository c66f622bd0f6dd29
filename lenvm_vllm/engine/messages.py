"""What goes to a value server of each text, and what a step wants to know.

Legend: B rows of a step, K candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.values.replicas import Build, Call
from value_server.contract import wire

# Of the time that a step may wait, the share that the server has; the rest is for the way.
SERVERS_SHARE = 0.9
# Why a text is none that a value model could read.
NOT_SEEN = "a prompt has pictures, sound or video, which the value model does not see"
# As long as no server has answered: any token is known, and gamma is one of the usual ones.
NOBODY = wire.ModelInfo(
    gamma=0.99,
    base_model="",
    tokenizer_fingerprint="",
    vocab_size=2**31 - 1,
    max_position=2**31 - 1,
    max_sessions=2**31 - 1,
    max_candidates=2**31 - 1,
)


@dataclass(frozen=True)
class Question:
    """Of B rows of a step. rows: numbers of those whose values are wanted.

    tokens: (B, K); a lookahead head tells of all. scored: (B, K) bool, those that are asked for
    where there is none, or in the rows `exactly` (B,) bool.
    """

    rows: list[int]
    tokens: Tensor
    scored: Tensor
    exactly: Tensor


@dataclass(frozen=True)
class Told:
    """What a message says of a text: these tokens, from `start` on; number: of its row in the step.

    whole: whether that is all there is of it, so that values can be asked for.
    """

    state: RequestState
    start: int
    tokens: list[int]
    whole: bool
    number: int = -1

    @property
    def end(self) -> int:
        """Tokens that the server then has."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, eq=False)
class Sent:
    """ahead: of its step; what it asks for is taken there."""

    call: Call
    told: list[Told]
    ahead: bool


def builder(
    told: Sequence[Told], tokens: Tensor | None = None, asks: Tensor | None = None
) -> Build:
    """Makes messages of some of `told`.

    tokens, asks: (len(told), K), and which of them are candidates; None: no row has any.
    """
    counts = [0] * len(told) if asks is None else asks.sum(-1).tolist()

    def build(rows: list[int], closed: list[str], seconds: float, rank: int) -> wire.StepRequest:
        mine, ids = [told[row] for row in rows], b""
        if tokens is not None and asks is not None:
            ids = wire.pack_ids(tokens[rows][asks[rows]].numpy())
        waits = rank or any(counts[row] for row in rows)
        return wire.StepRequest(
            sessions=[t.state.session for t in mine],
            starts=[t.start for t in mine],
            token_counts=[len(t.tokens) for t in mine],
            tokens=wire.pack_ids([token for t in mine for token in t.tokens]),
            candidate_counts=[counts[row] for row in rows],
            candidates=ids,
            closed=closed,
            lookahead_rank=rank,
            budget_ms=1000 * SERVERS_SHARE * seconds if waits else 0.0,
        )

    return build


def why_not(state: RequestState, info: wire.ModelInfo, ahead: bool = False) -> str | None:
    """Why the server cannot take this request's text and one token more, "" where the text is
    not known yet; None where it can. ahead: as far as it is known."""
    if state.prompt_ids is None:
        return "a prompt has no tokens"
    if state.has_media:
        return NOT_SEEN
    if state.refused is not None:
        return "the value server refuses a text, as its log tells"
    if not ahead and not state.is_known:
        return ""
    if state.length >= info.max_position:
        return f"a text is longer than the value model takes, {info.max_position} tokens"
    if max(state.unsent(), default=0) >= info.vocab_size:
        return f"a text has tokens that the value model does not know, from {info.vocab_size} on"
    return None
