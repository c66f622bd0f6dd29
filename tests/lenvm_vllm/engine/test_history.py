"""After any history the server holds the texts, and was told no token twice without need."""

import random
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenvm_vllm.engine import messages
from lenvm_vllm.engine import sessions as engine_sessions
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.values.client import TimedOut
from tests.support.toy import (
    GAMMA,
    Server,
    V,
    asked,
    request,
    sessions_of,
    settle,
    tell,
    told,
    valued,
    values,
)
from value_server.contract import wire
from value_server.contract.values import logit_from_length

EVENTS = ["open", "close", "forget", "no room", "fail", "fail again", "on its way", "tell"]
EVENTS += ["late", "step", "step", "step"]
PLAIN = logit_from_length(torch.tensor([10.0, 20, 40, 80]).double(), GAMMA)
PIECE, LONG = 8, 3  # tokens: texts come in pieces, and ahead


class Strict(Server):
    """Told of a text from where it said that it is, with its pictures where that is its start;
    asked about whole texts only."""

    def __init__(self, rank: int) -> None:
        super().__init__(by_text=True, lookahead_rank=rank, sees_pictures=True)
        self.said: dict[str, int] = {}
        self.texts_of: dict[str, RequestState] = {}
        self.wrong: list[Any] = []

    def step(self, request: wire.StepRequest) -> wire.StepReply:
        rows = told(request)
        self.wrong += [row for row in rows if row[1] != self.said.get(row[0], 0)]
        self.wrong += [rows] * (sum(len(tokens) for *_, tokens in rows) > PIECE)
        for row, (session, start, _) in enumerate(rows):
            pictures = [] if start else list(self.texts_of[session].media)
            self.wrong += [pictures] * (request.pictures.get(row, []) != pictures)
        for (session, start, tokens), ids in zip(rows, asked(request), strict=True):
            whole = start + len(tokens) == self.texts_of[session].length
            self.wrong += [ids] * (len(ids) > 0 and not whole)
        reply = super().step(request)
        self.said.update(zip(request.sessions, reply.held, strict=True))
        return reply


class History:
    """A server, requests that come and go, and whatever happens to them."""

    def __init__(self, rng: random.Random, rank: int) -> None:
        self.rng, self.server = rng, Strict(rank)
        self.sessions = sessions_of(self.server)
        self.states: list[RequestState] = []
        self.ended: list[RequestState] = []

    def pick(self) -> RequestState:
        return self.rng.choice(self.states)

    def happen(self, event: str) -> None:
        if event == "open":
            prompt = [self.rng.randrange(1, V) for _ in range(self.rng.randrange(20))]
            media = tuple(digit * 64 for digit in "12"[: self.rng.randrange(3)])
            self.states.append(request(prompt=prompt, media=media))
            self.server.texts_of[self.states[-1].session] = self.states[-1]
        elif event == "close" and self.states:
            self.ended.append(self.states.pop(self.rng.randrange(len(self.states))))
            self.sessions.close(self.ended[-1])
        elif event == "forget" and self.server.texts:
            self.server.texts.pop(self.rng.choice(list(self.server.texts)))
        elif event == "no room" and self.states:
            self.server.unheld ^= {self.pick().session}
        elif event == "on its way" and self.states:
            self.pick().output_ids.append(-1)
        elif event == "tell":
            tell(self.sessions, self.states, self.rng.choice((0.0, 1.0)))
            settle(self.sessions)
        elif event == "late":
            self.late()
        elif event in ("step", "fail", "fail again"):
            slow = [TimedOut("slow")]
            self.server.failures = {"fail": slow, "fail again": [None, *slow]}.get(event, [])
            self.step()
            self.server.failures = []

    def late(self) -> None:
        """Steps whose answers come only after they are over."""
        self.server.gate = threading.Event()
        before = len(self.server.requests)
        for _ in range(3):
            assert not any(valued(self.sessions, self.states, 0.002))
        self.server.gate.set()
        settle(self.sessions)
        assert len(self.server.requests) <= before + 1

    def step(self) -> None:
        """The next token of each, also of those whose last one comes late."""
        states = self.rng.sample(self.states, len(self.states))
        z = values(self.sessions, states)
        settle(self.sessions)
        assert len(z) == len(states)
        for state, mine in zip(states, z, strict=True):
            if not mine.isnan().all():
                bias = self.server.bias_of([*(state.prompt_ids or []), *state.output_ids])
                torch.testing.assert_close(mine, PLAIN + bias, atol=1e-5, rtol=0)
        for state in self.states:
            state.output_ids[:] = [t if t >= 0 else 80 for t in state.output_ids] + [40]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(EVENTS), max_size=30),
    st.randoms(use_true_random=False),
    st.sampled_from([0, 2]),
)
def test_after_any_history_the_server_holds_the_texts(
    history: list[str], rng: Any, rank: int
) -> None:
    """And values that a step has are those of its texts, by lookahead and without."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine_sessions, "PIECE", PIECE)
        patched.setattr(engine_sessions, "LONG", LONG)
        patched.setattr(messages, "AGAIN_S", 0.0)
        patched.setattr(messages, "PICTURES_S", (0.0, 0.0))
        all_of_it = History(rng, rank)
        for event in history:
            all_of_it.happen(event)
        check(all_of_it, fails="fail" in history or "fail again" in history)


def check(past: History, fails: bool) -> None:
    server, states = past.server, past.states
    server.unheld = set()
    for state in states:
        state.output_ids[:] = [t if t >= 0 else 80 for t in state.output_ids]
    pieces = sum(state.length for state in states) // PIECE + len(states)
    for _ in range(pieces + 3):  # a lost answer, and one that nobody waited for
        have = valued(past.sessions, states)
        settle(past.sessions)
    assert all(have)
    assert [server.texts[s.session] for s in states] == [
        s.prompt_ids + s.output_ids for s in states
    ]
    assert server.wrong == []
    known = [state.session for state in past.ended if state.session in server.said]
    assert len(set(server.closed)) == len(server.closed)
    assert set(server.closed) <= set(known)
    assert fails or set(server.closed) == set(known)
