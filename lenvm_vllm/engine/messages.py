"""What goes to a value server of each text, and what a step wants to know.

Legend: B rows of a step, K candidates.
"""

import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.values.replicas import Build, Call
from value_server.contract import wire

# Of the time that a step may wait, the share that the server has; the rest is for the way.
SERVERS_SHARE = 0.9
# Seconds after which a text is told again for which the server had no room. One with pictures, of
# which one may still be on its way, after the first ones, then twice as long up to the last.
AGAIN_S = 0.25
PICTURES_S = (0.05, 2.0)
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
        begin = ((row, t.state.media) for row, t in enumerate(mine) if t.start == 0)
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
            pictures={row: list(media) for row, media in begin if media},
        )

    return build


def pieces(states: Iterable[tuple[int, RequestState]], room: int) -> list[Told]:
    """What is new of texts, by the number of their row: short ones first, as far as a message
    goes. room: tokens of it."""
    now, told = time.perf_counter(), []
    for number, state in sorted(states, key=lambda entry: entry[1].length - entry[1].sent):
        tokens = state.unsent()
        part = tokens[:room] if state.again_at <= now else []
        if part or not tokens:
            told.append(Told(state, state.sent, part, len(part) == len(tokens), number))
            room -= len(part)
    return sorted(told, key=lambda t: t.number)


def open_rows(
    states: Sequence[RequestState], question: Question, in_vain: Container[int], z: Tensor
) -> list[int]:
    """Rows that have no values yet, or none that are exact where they should be. z: (B, K)."""
    open_, exactly = z.isnan().all(-1).tolist(), question.exactly.tolist()
    return [
        row
        for row in question.rows
        if states[row].refused is None and ((open_[row] and row not in in_vain) or exactly[row])
    ]


def take(sent: Sent, reply: wire.StepReply) -> None:
    """Each text goes on from what the server has."""
    for row, (told, held) in enumerate(zip(sent.told, reply.held, strict=True)):
        state = told.state
        state.sent, state.refused = held, reply.refused.get(row)
        if not held == told.start == 0 or not told.tokens:
            continue
        if state.media:
            first, last = PICTURES_S
            state.pause_s = min(2 * state.pause_s or first, last)
            state.again_at = time.perf_counter() + state.pause_s
        elif not sent.call.is_cut:  # no room
            state.again_at = time.perf_counter() + AGAIN_S


def why_not(
    state: RequestState, info: wire.ModelInfo, seen: bool, ahead: bool = False
) -> str | None:
    """Why the server cannot take this request's text and one token more, "" where the text is
    not known yet; None where it can. seen: whether it sees all of the prompt. ahead: as far as it
    is known."""
    if not seen:
        return NOT_SEEN
    if state.prompt_ids is None:
        return "a prompt has no tokens"
    if state.refused is not None:
        return "the value server refuses a text, as its log tells"
    if not ahead and not state.is_known:
        return ""
    if state.length >= info.max_position:
        return f"a text is longer than the value model takes, {info.max_position} tokens"
    if max(state.unsent(), default=0) >= info.vocab_size:
        return f"a text has tokens that the value model does not know, from {info.vocab_size} on"
    return None
