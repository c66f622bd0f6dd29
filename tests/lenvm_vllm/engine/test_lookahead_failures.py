"""What goes wrong with values that were asked for ahead of their step."""

import pytest

from lenvm_vllm.values.client import BadReply, TimedOut
from lenvm_vllm.values.replica import Call
from tests.support.toy import (
    SECONDS,
    Server,
    looking,
    request,
    sessions_of,
    settle,
    tell,
    told,
    valued,
    values,
)
from tests.support.waiting import answers_in_time, in_vain, of, shut, two

AT_ONCE = 0.05  # seconds that a step waits for what does not come
PLAIN = values(sessions_of(Server()), [request()])[0]


def test_an_answer_told_ahead_that_is_late_holds_no_step_up() -> None:
    server = looking()
    sessions, state = sessions_of(server), request()
    valued(sessions, [state])
    state.output_ids.append(80)
    shut(server)
    tell(sessions, [state], 0.01)
    in_vain(sessions, [state], AT_ONCE)
    for _ in range(3):
        assert valued(sessions, [state], 2 * SECONDS) == [False]  # it is not waited for again
    server.gate.set()
    settle(sessions)
    # A step later: the old query is of another text.
    state.output_ids.append(40)
    (row,) = values(sessions, [state])
    expected = server.bias_of([*(state.prompt_ids or []), *state.output_ids])
    assert float(row[0] - row[1]) == pytest.approx(float(PLAIN[0] - PLAIN[1]), abs=1e-5)
    assert float(row[0]) == pytest.approx(float(PLAIN[0]) + expected, abs=1e-5)


def test_a_row_without_values_leaves_its_neighbours_theirs() -> None:
    server = looking()
    sessions, states = sessions_of(server), [request(prompt=[n + 1]) for n in range(2)]
    valued(sessions, states)
    server.pending = [0]
    tell(sessions, states, 1.0)
    # It is asked again, as there was time left, and then is the only row.
    assert valued(sessions, states) == [False, True]
    assert [len(r.sessions) for r in server.requests] == [2, 2, 1]


def test_what_is_forgotten_is_told_again_in_the_same_step() -> None:
    server = looking()
    sessions, states = sessions_of(server), [request(prompt=[n + 1]) for n in range(2)]
    valued(sessions, states)
    for state in states:
        state.output_ids.append(80)
    server.texts.pop(states[1].session)
    tell(sessions, states, 1.0)
    assert valued(sessions, states) == [True, True]
    assert told(server.requests[-1]) == [(states[1].session, 0, [2, 80])]


def test_what_is_forgotten_is_told_again_though_its_answer_came_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It tells that the text is lost, which is no matter of time; the other row's is."""
    server = looking()
    sessions, states = sessions_of(server), [request(prompt=[n + 1]) for n in range(2)]
    valued(sessions, states)
    for state in states:
        state.output_ids.append(80)
    server.texts.pop(states[1].session)
    server.pending = [0]
    tell(sessions, states, 1.0)
    settle(sessions)
    monkeypatch.setattr(Call, "is_cut", True)
    server.pending = []
    assert valued(sessions, states) == [False, True]
    assert told(server.requests[-1]) == [(states[1].session, 0, [2, 80])]


def test_a_refused_row_is_not_asked_again() -> None:
    server = looking()
    sessions, states = sessions_of(server), [request(prompt=[n + 1]) for n in range(2)]
    valued(sessions, states)
    server.refused = {states[0].session: "for a reason"}
    tell(sessions, states, 1.0)
    assert valued(sessions, states) == [False, True]
    assert len(server.requests) == 2


def test_a_server_that_is_lost_between_telling_and_step() -> None:
    """Its sessions go to the other one, which has no such head."""
    a, b = looking(), Server(by_text=True)
    states, replicas = two(a, b)
    sessions = sessions_of(replicas)
    assert all(valued(sessions, states))
    for state in states:
        state.output_ids.append(80)
    a.failures = [TimedOut("slow")]
    a.rests = True
    tell(sessions, states, 1.0)
    assert all(valued(sessions, states))
    assert set(b.texts) == {state.session for state in states}


def test_a_late_server_keeps_no_other_from_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was told ahead is out to `a`; rows of `b` that were in no message are asked at once."""
    a, b = looking(), looking()
    states, replicas = two(a, b)
    sessions = sessions_of(replicas)
    assert all(valued(sessions, states))
    mine = [state for state in states if state.session in a.texts]
    for state in states:
        state.output_ids.append(80)
    shut(a)
    answers_in_time(monkeypatch)
    tell(sessions, mine, 1.0)
    assert valued(sessions, states, AT_ONCE) == of(b, states)
    a.gate.set()
    settle(sessions)


def test_keys_that_do_not_come_lose_the_server_and_no_step() -> None:
    server = looking()
    server.key_failures = [BadReply("keys: cut")]
    sessions, state = sessions_of(server), request()
    assert valued(sessions, [state]) == [False]
    assert isinstance(sessions.trouble, BadReply)
    assert not server.requests
    assert valued(sessions, [state]) == [True]
    assert sessions.trouble is None
