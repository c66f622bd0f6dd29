"""The texts as the value servers hold them: what is new is told, long texts before they are
needed, and each step asks for values, as long as it may wait.

Knows nothing of vLLM: it takes request states, and a client that carries messages.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lenvm_vllm.engine.pace import Pace
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.telemetry.metrics import Counters
from lenvm_vllm.values.client import ValueServerError
from lenvm_vllm.values.replicas import Call, Replicas
from value_server.contract import wire

logger = logging.getLogger("vllm.lenvm")

# Tokens of one message at most: after a restart of the server a thousand texts come in pieces.
PIECE = 8192
# New tokens from which on a text is told ahead of its step. Fewer cost the step's own pass nothing.
LONG = 16
# Seconds after which a text is told again for which the server had no room.
AGAIN_S = 0.25
# Of the time that a step may wait, the share that the server has; the rest is for the way.
SERVERS_SHARE = 0.9
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
class _Told:
    """What a message says of a text: these tokens, from `start` on; number: of its row in the step.

    whole: whether that is all there is of it, so that candidates can be asked for.
    """

    state: RequestState
    start: int
    tokens: list[int]
    whole: bool
    number: int = -1


@dataclass(frozen=True, eq=False)
class _Sent:
    call: Call
    told: list[_Told]


class Sessions:
    def __init__(
        self, client: Replicas, fingerprint: Callable[[], str | None], counters: Counters
    ) -> None:
        """fingerprint: of the tokenizer that vLLM serves; asked for once per connection."""
        self._client = client
        self._fingerprint = fingerprint
        self._counters = counters
        self._info = NOBODY
        self._out: list[_Sent] = []  # messages whose answers nobody has read yet
        self._logged: set[str] = set()
        self.trouble: ValueServerError | None = None  # why there are no values at all

    def model(self, until: float = 0.0) -> wire.ModelInfo:
        """The value model, or the last one that was known; waits at most until then, on the clock
        `perf_counter`."""
        try:
            self._info, self.trouble = self._client.model(self._fingerprint, until), None
        except ValueServerError as error:
            self.trouble = error
        return self._info

    def close(self, state: RequestState) -> None:
        """Tell the server with the next message that this request is over."""
        self._client.close(state.session)

    def tell_closed(self) -> None:
        """A message for nothing else, where no row is asked about."""
        self._read()
        if self._client.has_closed:
            self._send([])

    def tell(self, states: Iterable[RequestState]) -> None:
        """Long texts that are new, so that the server can begin with them. Waits for nothing."""
        new = [state for state in states if state.length - state.sent >= LONG]
        if not new:
            return
        info = self.model()
        self._read()
        if self.trouble is None:
            told = self._told(enumerate(s for s in new if _why_not(s, info, ahead=True) is None))
            if told := [t for t in told if t.tokens]:
                self._send(told)

    def askable(self, states: Sequence[RequestState], info: wire.ModelInfo) -> list[int]:
        """Numbers of those whose values the server can tell now. Why it cannot tell the others' is
        counted, and logged once."""
        why = [_why_not(state, info) for state in states]
        reasons = [reason for reason in why if reason]
        self._counters.add("unguided_rows", len(reasons))
        for reason in sorted({*reasons} - self._logged):
            logger.warning("length targets: %s; such texts are led without values", reason)
            self._logged.add(reason)
        return [number for number, reason in enumerate(why) if reason is None]

    def values(
        self, states: Sequence[RequestState], tokens: Tensor, wanted: Tensor, pace: Pace
    ) -> Tensor:
        """(B, K) float64 value logits of `tokens` (B, K) where `wanted`, NaN in rows that have none
        in time. A row in which nothing is wanted is not asked about."""
        z = torch.full(wanted.shape, torch.nan, dtype=torch.float64)
        started = time.perf_counter()
        until = started + pace.wait_s
        self._read(until)
        asked = wanted.any(-1).nonzero()[:, 0].tolist()
        if not asked:
            self.tell_closed()
        # A text that turns out to be lost is told again, to its server or to the one in its place.
        for _ in range(3):
            if asked and time.perf_counter() < until and self.trouble is None:
                told = self._told((number, states[number]) for number in asked)
                asks = wanted.clone()
                asks[[t.number for t in told if not t.whole]] = False
                sent = self._send(told, (tokens, asks), pace.floor_s, pace.wait_s)
                asked = self._take_values(sent, asks, until, z)
        self._counters.add("value_seconds", time.perf_counter() - started)
        return z

    def _take_values(
        self, messages: list[_Sent], asks: Tensor, until: float, z: Tensor
    ) -> list[int]:
        """Fill z of the rows that are answered; returns those whose text has to be told again."""
        again = []
        for sent in messages:
            if not sent.call.is_there(until):
                continue
            reply, rows = self._take(sent), [t.number for t in sent.told]
            if reply is None:
                again += rows  # its server is lost: another one may have them
                continue
            mine = z[rows]
            mine[asks[rows]] = torch.from_numpy(wire.unpack_logits(reply.logits).astype(np.float64))
            z[rows] = mine
            held = zip(sent.told, reply.held, strict=True)
            again += [t.number for t, there in held if there < t.start]
        return sorted(again)

    def _told(self, states: Iterable[tuple[int, RequestState]]) -> list[_Told]:
        """Of texts by the number of their row: short ones first, as far as a message goes."""
        now, room, told = time.perf_counter(), PIECE, []
        for number, state in sorted(states, key=lambda entry: entry[1].length - entry[1].sent):
            tokens = state.unsent()
            part = tokens[:room] if state.again_at <= now else []
            if part or not tokens:
                told.append(_Told(state, state.sent, part, len(part) == len(tokens), number))
                room -= len(part)
        return sorted(told, key=lambda t: t.number)

    def _send(
        self,
        told: list[_Told],
        asked: tuple[Tensor, Tensor] | None = None,
        least: float = math.inf,
        most: float = math.inf,
    ) -> list[_Sent]:
        """asked: (B, K) tokens of all rows of the step, and which of them are candidates; None: no
        values are wanted. least, most: seconds that an answer may take."""
        numbers, counts = [t.number for t in told], [0] * len(told)
        if asked:
            ids, mask = (part[numbers] for part in asked)
            counts = mask.sum(-1).tolist()

        def build(rows: list[int], closed: list[str], seconds: float) -> wire.StepRequest:
            mine = [told[row] for row in rows]
            return wire.StepRequest(
                sessions=[t.state.session for t in mine],
                starts=[t.start for t in mine],
                token_counts=[len(t.tokens) for t in mine],
                tokens=wire.pack_ids([token for t in mine for token in t.tokens]),
                candidate_counts=[counts[row] for row in rows],
                candidates=wire.pack_ids(ids[rows][mask[rows]].numpy()) if asked else b"",
                closed=closed,
                budget_ms=1000 * SERVERS_SHARE * seconds if any(counts[r] for r in rows) else 0.0,
            )

        try:
            sessions = [t.state.session for t in told]
            calls = self._client.send(sessions, counts, build, least, most)
        except ValueServerError as error:
            self.trouble = error
            return []
        sent = [_Sent(call, [told[row] for row in call.rows]) for call in calls]
        self._out += sent
        return sent

    def _read(self, until: float = 0.0) -> None:
        """The answers that have come meanwhile: values of a step that is over are of no use.

        until: as long as what was told ahead of this step is waited for.
        """
        for sent in list(self._out):
            if sent.call.is_there(0.0 if sent.call.candidates else until):
                self._take(sent)

    def _take(self, sent: _Sent) -> wire.StepReply | None:
        """The answer; None where its server is lost. Each text goes on from what the server has."""
        self._out.remove(sent)
        if (reply := self._client.read(sent.call)) is None:
            return None
        for row, (told, held) in enumerate(zip(sent.told, reply.held, strict=True)):
            told.state.sent = held
            told.state.refused = reply.refused.get(row)
            if held == told.start == 0 and told.tokens and not sent.call.is_cut:  # no room
                told.state.again_at = time.perf_counter() + AGAIN_S
        return reply


def _why_not(state: RequestState, info: wire.ModelInfo, ahead: bool = False) -> str | None:
    """Why the server cannot take this request's text and one token more, "" where the text is
    not known yet; None where it can. ahead: as far as it is known."""
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
