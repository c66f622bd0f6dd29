"""Long texts are told in pieces and ahead of their steps; single rows are refused, or wait."""

import logging
import time

import pytest

from lenvm_vllm.engine import messages
from lenvm_vllm.engine.sessions import LONG, PIECE
from lenvm_vllm.engine.state import RequestState
from tests.support.toy import Server, asked, request, sessions_of, settle, tell, told, valued


def long(tokens: int, token: int = 7) -> RequestState:
    return request(prompt=[token] * tokens)


# ---- in pieces


def test_texts_of_more_than_a_piece_come_in_several_messages() -> None:
    """Short ones first; those that are whole have values meanwhile."""
    server = Server(max_position=10 * PIECE)
    sessions = sessions_of(server)
    states = [long(PIECE), long(2 * PIECE + 5), long(10), long(20)]
    seen = []
    while not seen or not all(seen[-1]):
        seen.append(valued(sessions, states))
        for state in states:
            state.output_ids.append(80)
    assert seen[0] == [False, False, True, True]
    assert seen[1] == [True, False, True, True]
    for number in range(4):
        column = [step[number] for step in seen]
        assert column == sorted(column)  # none loses them again
    assert len(seen) == len(server.requests) == 4
    for message in server.requests:
        assert sum(len(tokens) for *_, tokens in told(message)) <= PIECE
    for state in states:
        assert server.texts[state.session] == [*(state.prompt_ids or []), *state.output_ids[:-1]]


def test_nothing_is_asked_of_a_text_that_is_not_whole() -> None:
    server = Server(max_position=10 * PIECE)
    sessions, state = sessions_of(server), long(PIECE + 1)
    assert valued(sessions, [state]) == [False]
    assert valued(sessions, [state]) == [True]
    assert [len(ids) for message in server.requests for ids in asked(message)] == [0, 4]


def test_all_texts_of_a_server_that_lost_them_come_again() -> None:
    server = Server(max_position=10 * PIECE)
    sessions = sessions_of(server)
    states = [long(PIECE // 4 + number) for number in range(9)]
    while not all(valued(sessions, states)):
        pass
    server.texts.clear()
    before = len(server.requests)
    assert not all(valued(sessions, states))
    steps = 1
    while not all(valued(sessions, states)):
        steps += 1
    assert steps <= 3  # 9 of them are two messages and a bit
    tokens = [len(t) for message in server.requests[before:] for *_, t in told(message)]
    assert sum(tokens) == sum(state.length for state in states)


# ---- ahead of the step


def test_long_texts_are_told_ahead_and_asked_nothing() -> None:
    server = Server()
    sessions = sessions_of(server)
    valued(sessions, [known := long(30)])
    known.output_ids.append(80)
    new, short = long(LONG), long(LONG - 1)
    tell(sessions, [known, new, short])
    settle(sessions)
    message = server.requests[-1]
    assert told(message) == [(new.session, 0, [7] * LONG)]
    assert (asked(message), message.budget_ms) == ([[]], 0)
    assert valued(sessions, [known, new, short]) == [True] * 3
    assert [row[1:] for row in told(server.requests[-1])] == [(30, [80]), (16, []), (0, [7] * 15)]


def test_nothing_new_is_no_message() -> None:
    server = Server()
    sessions, state = sessions_of(server), long(30)
    valued(sessions, [state])
    for _ in range(2):
        tell(sessions, [state])
    settle(sessions)
    assert len(server.requests) == 1


def test_a_token_that_is_not_known_yet_is_not_told_ahead() -> None:
    server = Server()
    sessions, state = sessions_of(server), long(30)
    valued(sessions, [request()])
    state.output_ids += [80, -1]
    tell(sessions, [state])
    settle(sessions)
    assert told(server.requests[-1]) == [(state.session, 0, [7] * 30 + [80])]
    state.output_ids[-1] = 40
    assert valued(sessions, [state]) == [True]
    assert told(server.requests[-1]) == [(state.session, 31, [40])]


def test_what_the_server_cannot_read_is_not_told_ahead() -> None:
    server = Server(max_position=50, vocab_size=100)
    sessions = sessions_of(server)
    valued(sessions, [request(prompt=[7])])
    unread = request()
    unread.prompt_ids, unread.output_ids = None, [7] * 30
    tell(sessions, [long(50), long(30, token=100), unread])
    settle(sessions)
    assert len(server.requests) == 1


# ---- single rows


def test_a_refused_row_is_that_rows_alone(log: list[logging.LogRecord]) -> None:
    server = Server()
    sessions, states = sessions_of(server), [request() for _ in range(3)]
    server.refused = {states[1].session: "longer than the cache"}
    for _ in range(3):
        assert valued(sessions, states) == [True, False, True]
    rows = [session for message in server.requests for session, *_ in told(message)]
    assert rows.count(states[1].session) == 1
    assert states[1].refused == "longer than the cache"
    assert len(log) == 1
    assert "the value server refuses a text" in log[0].getMessage()


def test_a_row_without_room_is_told_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "AGAIN_S", 1e6)
    server = Server()
    sessions, states = sessions_of(server), [request(), request()]
    server.unheld = {states[1].session}
    assert valued(sessions, states) == [True, False]
    server.unheld = set()
    for _ in range(3):
        assert valued(sessions, states) == [True, False]
    assert [len(message.sessions) for message in server.requests] == [2, 1, 1, 1]
    monkeypatch.setattr(states[1], "again_at", time.perf_counter())
    assert valued(sessions, states) == [True, True]
