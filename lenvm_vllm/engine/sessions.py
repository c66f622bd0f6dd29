"""The texts as the value servers hold them: what is new is told, where it can be before it is
needed, and each step asks for values, as long as it may wait.

Knows nothing of vLLM: it takes request states, and a client that carries messages.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from lenvm_vllm.engine.messages import (
    NOBODY,
    NOT_SEEN,
    Question,
    Sent,
    Told,
    builder,
    open_rows,
    pieces,
    take,
    why_not,
)
from lenvm_vllm.engine.pace import Pace
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.target.request import UNSEEN
from lenvm_vllm.telemetry.metrics import Counters
from lenvm_vllm.values.client import ValueServerError
from lenvm_vllm.values.replicas import Build, Replicas
from value_server.contract import wire

logger = logging.getLogger("vllm.lenvm")

# Tokens of one message at most: after a restart of the server a thousand texts come in pieces.
PIECE = 8192
# New tokens from which on a text is told ahead of its step. Fewer cost the step's own pass nothing.
LONG = 16


class Sessions:
    def __init__(
        self, client: Replicas, fingerprint: Callable[[], str | None], counters: Counters
    ) -> None:
        """fingerprint: of the tokenizer that vLLM serves; asked for once per connection."""
        self._client = client
        self._fingerprint = fingerprint
        self._counters = counters
        self.info = NOBODY  # as it was last known
        self._out: list[Sent] = []  # messages whose answers nobody has read yet
        self._logged: set[str] = set()
        self.trouble: ValueServerError | None = None  # why there are no values at all

    def model(self, until: float = 0.0) -> wire.ModelInfo:
        """The value model, or the last one known; waits until then at most, by `perf_counter`."""
        try:
            self.info, self.trouble = self._client.model(self._fingerprint, until), None
        except ValueServerError as error:
            self.trouble = error.bare()
        return self.info

    def close(self, state: RequestState) -> None:
        """Tell the server with the next message that this request is over."""
        self._client.close(state.session)

    def tell_closed(self) -> None:
        """A message for nothing else, where no row is asked about."""
        self._read()
        if self._client.has_closed:
            self._send([], builder([]))

    def tell(self, states: Iterable[RequestState], pace: Pace) -> None:
        """What is new of texts, so that the server computes beside vLLM. Waits for nothing.

        Of a text that has lookahead the step that follows takes the values; of others, long ones
        alone are told.
        """
        states = [s for s in states if s.target.wants_values and self._is_seen(s)]
        # A server has one message at a time: while a newest token is on its way, the step asks.
        asks = pace.step_s > 0 and all(state.is_known for state in states if state.has_turn)
        looks = [asks and looks_ahead for looks_ahead in self.looks_ahead(states)]
        ahead = [
            state
            for state, looks_ahead in zip(states, looks, strict=True)
            if state.length - state.sent >= LONG or (looks_ahead and state.has_turn)
        ]
        if not ahead:
            return
        info = self.model()
        self._read()
        if self.trouble is None:
            can = [
                state
                for state in ahead
                if why_not(state, info, self._is_seen(state), ahead=True) is None
                and self._client.is_free(state.session)
            ]
            told = pieces(enumerate(can), PIECE)
            looks = [asks and own for own in self.looks_ahead([t.state for t in told])]
            told = [t for t, asked in zip(told, looks, strict=True) if t.tokens or asked]
            # Its answer is waited for in the step, when vLLM's own part is done.
            least, most = pace.floor_s + pace.step_s, pace.wait_s + pace.step_s
            if told:
                self._send(told, builder(told), least, most, any(looks), ahead=True)

    @property
    def any_looks_ahead(self) -> bool:
        """Whether any server does what `looks_ahead` says."""
        return self._client.any_looks_ahead

    def looks_ahead(self, states: Sequence[RequestState]) -> list[bool]:
        """Whether the server of each text tells of all tokens without being asked for them."""
        any_ = self._client.any_looks_ahead
        return [any_ and self._client.looks_ahead(state.session) for state in states]

    def askable(self, states: Sequence[RequestState], info: wire.ModelInfo) -> list[int]:
        """Numbers of those that want values and whose values the server can tell now. Why it cannot
        tell the others' is counted, and logged once."""
        wanting = ((i, s) for i, s in enumerate(states) if s.target.wants_values)
        why = {i: why_not(s, info, self._is_seen(s)) for i, s in wanting}
        reasons = [reason for reason in why.values() if reason]
        self._counters.add("unguided_rows", len(reasons))
        for state in (states[number] for number, reason in why.items() if reason == NOT_SEEN):
            self._counters.add("unseen_requests", not state.unseen)
            state.unseen = True
        for reason in sorted({*reasons} - self._logged):
            logger.warning("length targets: %s; such texts are led without values", reason)
            self._logged.add(reason)
        return [number for number, reason in why.items() if reason is None]

    def _is_seen(self, state: RequestState) -> bool:
        """Whether the server of a text sees all of its prompt."""
        sees = self._client.sees
        return not state.has_media or (UNSEEN not in state.media and sees(state.session))

    def values(self, states: Sequence[RequestState], question: Question, pace: Pace) -> Tensor:
        """(B, K) float64 value logits, NaN in rows that have none in time, and where a token was
        not scored."""
        z = torch.full(question.tokens.shape, torch.nan, dtype=torch.float64)
        started = time.perf_counter()
        until = started + pace.wait_s
        in_vain = self._take_ahead(states, question, 0.0, (), z)
        # A server that owes no answer is asked before the others' answers are waited for.
        rows = open_rows(states, question, in_vain, z)
        early, asks, owed = self._ask(rows, states, question, pace, z)
        for row in owed:
            self._client.hear(states[row].session, until)
        in_vain |= self._take_ahead(states, question, until, early, z)
        owed += self._take_values(early, question.tokens, asks, until, z)
        if not question.rows:
            self.tell_closed()
        rows = [row for row in open_rows(states, question, in_vain, z) if row in owed]
        # A text that turns out to be lost is told again, to its server or to the one in its place.
        for _ in range(3):
            if rows and time.perf_counter() < until:
                messages, asks, _ = self._ask(rows, states, question, pace, z)
                rows = self._take_values(messages, question.tokens, asks, until, z)
        self._counters.add("value_seconds", time.perf_counter() - started)
        return z

    def _ask(
        self,
        rows: Sequence[int],
        states: Sequence[RequestState],
        question: Question,
        pace: Pace,
        z: Tensor,
    ) -> tuple[list[Sent], Tensor, list[int]]:
        """Messages to the servers that owe no answer, (B, K) bool: the candidates in them, and the
        rows of the other servers."""
        asks = question.scored.clone()
        owed = [row for row in rows if not self._client.is_free(states[row].session)]
        free = set(rows).difference(owed)
        if not free or self.trouble is not None:
            return [], asks, owed
        seen = [(number, states[number]) for number in free if self._is_seen(states[number])]
        told = pieces(seen, PIECE)
        looks = self.looks_ahead([t.state for t in told])
        for t, looks_ahead in zip(told, looks, strict=True):
            if not t.whole or (looks_ahead and not question.exactly[t.number]):
                asks[t.number] = False
        numbers = [t.number for t in told]
        build = builder(told, question.tokens[numbers], asks[numbers])
        counts = asks[numbers].sum(-1).tolist()
        open_ = bool(z[numbers].isnan().all(-1).any())
        return self._send(told, build, pace.floor_s, pace.wait_s, open_, counts), asks, owed

    def _take_ahead(
        self,
        states: Sequence[RequestState],
        question: Question,
        until: float,
        but: Sequence[Sent],
        z: Tensor,
    ) -> set[int]:
        """Fill z of the rows whose values were asked for ahead of this step; returns those for
        which the time of a step was not enough, though their text was there."""
        answers, in_vain = self._read(until, but), set[int]()
        wanted = {states[row].session: row for row in question.rows} if answers else {}
        for sent, reply in answers:
            rows = [wanted.get(t.state.session) for t in sent.told]
            # What was told then may be less than there is now.
            mine = [
                row if row is not None and t.end == states[row].length else None
                for t, row in zip(sent.told, rows, strict=True)
            ]
            self._look_ahead(sent, reply, mine, question.tokens, z)
            if sent.call.is_cut:
                texts = zip(mine, sent.told, reply.held, strict=True)
                there = [row for row, t, held in texts if row is not None and held >= t.end]
                in_vain |= {row for row in there if bool(z[row, 0].isnan())}
        return in_vain

    def _look_ahead(
        self,
        sent: Sent,
        reply: wire.StepReply,
        rows: Sequence[int | None],
        tokens: Tensor,
        z: Tensor,
    ) -> None:
        """Fill z by the queries of an answer. rows: the row of the step of each of its texts."""
        found = [(own, row) for own, row in enumerate(rows) if row is not None]
        if found:
            own, mine = map(list, zip(*found, strict=True))
            z[mine] = self._client.after(sent.call, reply, own, tokens[mine])

    def _take_values(
        self, messages: list[Sent], tokens: Tensor, asks: Tensor, until: float, z: Tensor
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
            if sent.call.keys:
                whole = [t.number if t.whole else None for t in sent.told]
                self._look_ahead(sent, reply, whole, tokens, z)
            exact = torch.full_like(z[rows], torch.nan)
            exact[asks[rows]] = torch.from_numpy(
                wire.unpack_logits(reply.logits).astype(np.float64)
            )
            z[rows] = torch.where(exact.isnan().all(-1, keepdim=True), z[rows], exact)
            held = zip(sent.told, reply.held, strict=True)
            again += [t.number for t, there in held if there < t.start]
        return sorted(again)

    def _send(
        self,
        told: list[Told],
        build: Build,
        least: float = math.inf,
        most: float = math.inf,
        queries: bool = False,
        counts: Sequence[int] = (),
        ahead: bool = False,
    ) -> list[Sent]:
        """build: makes messages of `told`. least, most: seconds that an answer may take.

        queries: whether those of texts that have lookahead are asked for. counts: candidates of
        each text, none at all if empty.
        """
        try:
            sessions = [t.state.session for t in told]
            counts = counts or [0] * len(told)
            calls = self._client.send(sessions, counts, build, least, most, queries)
        except ValueServerError as error:
            self.trouble = error.bare()
            return []
        sent = [Sent(call, [told[row] for row in call.rows], ahead) for call in calls]
        self._out += sent
        return sent

    def _read(
        self, until: float = 0.0, but: Sequence[Sent] = ()
    ) -> list[tuple[Sent, wire.StepReply]]:
        """Takes the answers that have come, and until then those to what was told ahead of this
        step; returns those with values that were asked for ahead. but: messages of this step."""
        found = []
        for sent in [sent for sent in self._out if sent not in but]:
            if sent.call.is_there(until if sent.ahead else 0.0):
                reply = self._take(sent)
                if reply is not None and sent.ahead and sent.call.keys:
                    found.append((sent, reply))
        return found

    def _take(self, sent: Sent) -> wire.StepReply | None:
        """The answer; None where its server is lost."""
        self._out.remove(sent)
        if (reply := self._client.read(sent.call)) is None:
            return None
        take(sent, reply)
        return reply
