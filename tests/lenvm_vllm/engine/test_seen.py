"""Prompts with pictures beside a value model that sees them.

Legend: V vocabulary. Token 0 is the end; token x is worth x more tokens.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from lenvm_vllm.engine import messages
from lenvm_vllm.engine.sessions import Sessions
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.target.request import MEDIA, UNSEEN
from lenvm_vllm.telemetry.metrics import Counters
from lenvm_vllm.values.client import Unreachable
from lenvm_vllm.values.replicas import Replicas
from tests.support import fakes, toy
from tests.support.fakes import V, free, params, same_bits
from tests.support.toy import request, sessions_of, tell, told, valued
from tests.support.v1_batch import added, processor_with, update
from tests.support.v2_slots import Runner
from value_server.contract import wire

ONE, TWO = "1" * 64, "2" * 64


class Gallery(toy.Server):
    """Has the pictures in `there`; a text with another one it does not hold."""

    def __init__(self, **info: Any) -> None:
        super().__init__(**{"sees_pictures": True, "picture_token": 31} | info)
        self.there: set[str] = set()
        self.shown: dict[str, list[str]] = {}

    def step(self, request: wire.StepRequest) -> wire.StepReply:
        for row, session in enumerate(request.sessions):
            if request.starts[row] == 0 and request.token_counts[row]:
                self.shown[session] = request.pictures.get(row, [])
            lacks = set(self.shown.get(session, ())) - self.there
            (self.unheld.add if lacks else self.unheld.discard)(session)
        return super().step(request)


def with_pictures(*digests: str, **fields: Any) -> RequestState:
    return request(media=digests, **fields)


# ---- both runners


def v1(server: fakes.Server, wishes: list[Any]) -> Tensor:
    served = processor_with(server)
    served.update_state(update(added=[added(row, wish) for row, wish in enumerate(wishes)]))
    return served.apply(torch.zeros(len(wishes), V))


def v2(server: fakes.Server, wishes: list[Any]) -> Tensor:
    runner = Runner(server)
    for slot, wish in enumerate(wishes):
        runner.add(slot, wish)
    return runner.step(*range(len(wishes)))


@pytest.mark.parametrize("runner", [v1, v2])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_pictures_go_along_with_the_text(runner: Any, rank: int) -> None:
    server = fakes.Server(sees_pictures=True, lookahead_rank=rank)
    wishes = [params(free(9) | more) for more in ({MEDIA: [ONE, TWO]}, {}, {MEDIA: [ONE, UNSEEN]})]
    steered = runner(server, wishes)
    (message,) = [request for request in server.requests if request.sessions]
    assert (message.starts, message.pictures) == ([0, 0], {0: [ONE, TWO]})
    assert same_bits(steered[0], steered[1])  # the fake's values are of tokens alone
    assert not same_bits(steered[0], steered[2])


# ---- what is told


def test_they_are_told_whenever_a_text_begins_anew() -> None:
    server = Gallery()
    server.there = {ONE}
    sessions, state = sessions_of(server), with_pictures(ONE, prompt=[7, 31])
    assert valued(sessions, [state]) == [True]
    state.output_ids.append(80)
    assert valued(sessions, [state]) == [True]
    server.texts.clear()
    state.output_ids.append(40)
    assert valued(sessions, [state]) == [True]
    assert [request.pictures for request in server.requests] == [{0: [ONE]}, {}, {}, {0: [ONE]}]
    assert told(server.requests[-1]) == [(state.session, 0, [7, 31, 80, 40])]


def test_a_long_text_is_told_ahead_with_its_pictures() -> None:
    server = Gallery()
    server.there = {ONE}
    sessions, state = sessions_of(server), with_pictures(ONE, prompt=[7] * 40)
    tell(sessions, [state])
    toy.settle(sessions)
    assert server.requests[0].pictures == {0: [ONE]}
    assert valued(sessions, [state]) == [True]
    assert server.requests[-1].pictures == {}


def test_a_text_in_pieces_has_them_in_its_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lenvm_vllm.engine.sessions.PIECE", 8)
    server = Gallery()
    server.there = {ONE}
    sessions, state = sessions_of(server), with_pictures(ONE, prompt=[7] * 20)
    assert [valued(sessions, [state])[0] for _ in range(3)] == [False, False, True]
    assert [request.pictures for request in server.requests] == [{0: [ONE]}, {}, {}]


# ---- a picture that is not there


def test_a_late_picture_hammers_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text is told again after a while, and after twice as long; its neighbour is not hurt."""
    clock = [100.0]
    monkeypatch.setattr(messages.time, "perf_counter", lambda: clock[0])
    server = Gallery()
    sessions = sessions_of(server)
    late, other = with_pictures(ONE, prompt=[7, 31]), request()
    tries = []
    for step in range(60):
        clock[0] = 100 + step / 9.99
        late.output_ids.append(80)
        other.output_ids.append(80)
        seen = len(server.requests)
        assert valued(sessions, [late, other]) == [False, True]
        messages_ = server.requests[seen:]
        assert len(messages_) == 1
        if late.session in messages_[0].sessions:
            tries.append(step)
    assert tries == [0, 1, 2, 4, 8, 16, 32, 52]
    server.there = {ONE}
    clock[0] += 2.1
    late.output_ids.append(80)
    assert valued(sessions, [late]) == [True]


def test_one_that_the_server_refuses_is_asked_about_no_more() -> None:
    server = Gallery()
    server.there = {ONE}
    sessions, state = sessions_of(server), with_pictures(ONE)
    server.refused = {state.session: "pictures: one cannot be seen"}
    assert valued(sessions, [state]) == [False]
    state.output_ids.append(80)
    assert valued(sessions, [state]) == [False]
    assert len(server.requests) == 1


# ---- several servers


def test_only_a_replica_that_sees_is_told() -> None:
    """While one is replaced by a model that sees, the other reads text alone."""
    names = "http://blind", "http://seeing"
    servers = {names[0]: toy.Server(), names[1]: Gallery()}
    servers[names[1]].there = {ONE}  # type: ignore[attr-defined]
    sessions = sessions_of(Replicas(servers))
    states = [with_pictures(ONE) for _ in range(12)]
    got = valued(sessions, states)
    assert 0 < sum(got) < 12
    assert not servers[names[0]].requests
    assert [state.unseen for state in states] == [not valued for valued in got]
    # Its texts do not move to one that is blind.
    servers[names[1]].failures = [Unreachable("gone")]
    for state in states:
        state.output_ids.append(80)
    assert not any(valued(sessions, states))
    assert not servers[names[0]].requests


def test_no_server_at_all_is_another_matter() -> None:
    class Gone(toy.Server):
        def model(self, fingerprint: Any) -> Any:
            raise Unreachable("gone")

    counted: list[str] = []
    counters = Counters()
    counters.add = lambda name, amount=1.0: counted.append(name)  # type: ignore[method-assign]
    sessions = Sessions(fakes.replicas_of(Gone()), lambda: None, counters)
    state = with_pictures(ONE)
    assert valued(sessions, [state], wait_s=0.1) == [False]
    assert not state.unseen
    assert "unseen_requests" not in counted
