"""A step waits for values as long as it may: what comes later, and from whom it is not awaited.

The servers answer when the test lets them. A step that came back before that has not waited.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lenvm_vllm.engine.guide import Guide
from lenvm_vllm.engine.sessions import Sessions
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.values import replicas as replicas_
from lenvm_vllm.values.client import TimedOut, Unreachable
from lenvm_vllm.values.patience import LATE_ANSWERS
from lenvm_vllm.values.replica import OneServer
from tests.support.toy import (
    SECONDS,
    Server,
    flat_logits,
    guide_of,
    renew,
    request,
    sessions_of,
    settle,
    steered,
    tell,
    told,
    valued,
)
from tests.support.waiting import answers_in_time, in_vain, of, shut, two
from value_server.contract.wire import StepRequest

SHORT = 0.05  # seconds that a step waits for a server that does not answer


def late_step(server: Server, sessions: Sessions, states: list[RequestState]) -> None:
    """One whose answer comes after it; a step that is held up before it asks is none."""
    before = len(server.requests)
    while len(server.requests) == before:
        shut(server)
        assert not any(valued(sessions, states, SHORT))
        server.gate.set()
        settle(sessions)


def begun(count: int = 1) -> tuple[Server, Sessions, list[RequestState]]:
    """Requests whose prompts the server has."""
    server = Server()
    sessions, states = sessions_of(server), [request() for _ in range(count)]
    assert all(valued(sessions, states))
    return server, sessions, states


# ---- one late answer


def test_a_late_answer_is_waited_for_once_and_nothing_is_asked_meanwhile() -> None:
    server, sessions, (state,) = begun()
    shut(server)
    state.output_ids.append(80)
    assert valued(sessions, [state], SHORT) == [False]
    for _ in range(3):
        state.output_ids.append(40)
        assert valued(sessions, [state], 2 * SECONDS) == [False]  # it is not waited for again
    assert len(server.requests) == 2
    server.gate.set()


def test_what_was_not_told_meanwhile_is_told_and_nothing_twice() -> None:
    server, sessions, (state,) = begun()
    shut(server)
    for token in (80, 40, 20):
        state.output_ids.append(token)
        valued(sessions, [state], SHORT)
    server.gate.set()
    settle(sessions)
    assert valued(sessions, [state]) == [True]
    rows = [row[1:] for message in server.requests for row in told(message)]
    assert rows == [(0, [7, 50]), (2, [80]), (3, [40, 20])]


def test_a_request_that_ends_while_its_answer_is_out() -> None:
    server, sessions, (gone, stays) = begun(2)
    shut(server)
    valued(sessions, [gone, stays], SHORT)
    sessions.close(gone)
    valued(sessions, [stays], SHORT)
    server.gate.set()
    settle(sessions)
    assert valued(sessions, [stays]) == [True]
    assert server.closed == [gone.session]
    assert set(server.texts) == {stays.session}


def test_a_message_that_only_closes_others_costs_no_row_its_values() -> None:
    """Nobody waits for it but the rows that come after it."""
    server, sessions, (gone, state) = begun(2)
    shut(server)
    sessions.close(gone)
    sessions.tell_closed()
    state.output_ids.append(80)
    threading.Timer(SHORT, server.gate.set).start()
    assert valued(sessions, [state]) == [True]
    assert [message.closed for message in server.requests[1:]] == [[gone.session], []]


def test_a_server_that_never_answers_is_lost_when_its_client_says_so() -> None:
    server, sessions, (state,) = begun()
    shut(server)
    server.failures = [TimedOut("slow")]
    assert valued(sessions, [state], SHORT) == [False]
    server.gate.set()
    settle(sessions)
    assert valued(sessions, [state]) == [False]
    assert isinstance(sessions.trouble, TimedOut)
    assert valued(sessions, [state]) == [True]


def test_what_was_sent_ahead_is_waited_for_in_one_step_only() -> None:
    server, sessions, (old,) = begun()
    new = request(prompt=[9] * 100)
    shut(server)
    tell(sessions, [new])
    in_vain(sessions, [old, new], SHORT)
    assert len(server.requests) == 2
    for _ in range(3):
        assert valued(sessions, [old, new], 2 * SECONDS) == [False, False]
    server.gate.set()
    settle(sessions)
    assert valued(sessions, [old, new]) == [True, True]


def test_rows_without_an_answer_are_led_alone() -> None:
    """In its landing a text is brought to its end; one before it is left as it is."""
    server = Server()
    guide = guide_of(server)
    states = {0: request(30, output=[50] * 10), 1: request(30, output=[50] * 30)}
    server.pending = [1]
    logits = flat_logits(2, (0, 10, 20, 40, 80))
    after = steered(guide, logits, states).softmax(-1)
    assert [states[row].valued for row in states] == [True, False]
    assert after[0, 0] == 0  # no end before the landing
    assert after[1, 0] > 0.9
    assert after[1, 10] == pytest.approx(float(after[1, 80]))  # no values move the text


# ---- servers that are slow


def test_one_that_is_late_too_often_is_not_waited_for(
    log: list[logging.LogRecord],
) -> None:
    server, sessions, states = begun()
    for _ in range(LATE_ANSWERS):
        late_step(server, sessions, states)
    shut(server)
    before = len(server.requests)
    assert valued(sessions, states, SECONDS) == [False]  # is asked, and not waited for
    server.gate.set()
    settle(sessions)
    assert len(server.requests) == before + 1
    assert valued(sessions, states) == [True]  # that one came in time: so it is waited for again
    first, second = (record.getMessage() for record in log)
    assert "go on without waiting" in first
    assert "are in time again" in second


def test_fewer_late_answers_change_nothing(
    log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That are late by a little: one that takes several times as long counts as so many."""

    def ask(client: OneServer, make: Callable[[], StepRequest], _: float) -> Any:
        return client.step(make()), 1.1 * SHORT

    monkeypatch.setattr(replicas_, "ask", ask)
    server, sessions, states = begun()
    for _ in range(2):
        for _ in range(LATE_ANSWERS - 1):
            late_step(server, sessions, states)
        assert valued(sessions, states) == [True]
    assert not log


# ---- several servers


def test_one_that_hangs_leaves_the_rows_of_the_others_their_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = Server(), Server()
    states, replicas = two(a, b)
    sessions = sessions_of(replicas)
    assert all(valued(sessions, states))
    mine = of(a, states)
    assert 0 < sum(mine) < 20
    shut(b)
    answers_in_time(monkeypatch)
    for state in states:
        state.output_ids.append(80)
    assert valued(sessions, states, SHORT) == mine
    for _ in range(3):
        assert valued(sessions, states, SECONDS) == mine
    b.gate.set()
    settle(sessions)
    assert all(valued(sessions, states))


def test_a_bug_in_one_answer_leaves_the_other_to_be_read() -> None:
    a, b = Server(), Server()
    states, replicas = two(a, b)
    sessions = sessions_of(replicas)
    assert all(valued(sessions, states))
    for state in states:
        state.output_ids.append(80)
    a.failures = [RuntimeError("a bug")]
    with pytest.raises(RuntimeError, match="a bug"):
        valued(sessions, states)
    settle(sessions)
    assert all(valued(sessions, states))
    assert [len(message.sessions) for message in b.requests] == [sum(of(b, states))] * 3
    assert told(b.requests[-1])[0][1:] == (3, [])  # the answer of the step before was read


def test_a_guided_step_survives_the_loss_of_its_server() -> None:
    """All rows have values in the very step in which one goes."""
    a, b = Server(), Server()
    states, replicas = two(a, b)
    guide: Guide = guide_of(replicas)
    rows = dict(enumerate(states))
    for output in ([], [50], [50, 60]):
        for state in states:
            state.output_ids = list(output)
        renew(states)
        guide.plan(torch.zeros(20, 400), rows)
        assert all(state.valued for state in states)
        a.failures = [Unreachable("gone")] * (output == [])
        a.rests = True
    assert set(b.texts) == {state.session for state in states}
