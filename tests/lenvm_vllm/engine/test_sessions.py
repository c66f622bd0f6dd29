"""What the value server is told of the texts, of which rows it is asked, and what is closed."""

from typing import Any

import pytest
import torch

from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.values.client import TimedOut
from tests.support.toy import (
    EOS,
    Server,
    asked,
    flat_logits,
    guide_of,
    guided_rows,
    request,
    sessions_of,
    settle,
    steered,
    told,
    valued,
)


def test_one_call_carries_all_rows() -> None:
    server = Server()
    guide = guide_of(server)
    states = {4: request(prompt=[1, 2, 3]), 1: request(prompt=[9])}
    assert guided_rows(guide, flat_logits(5), states) == [1, 4]
    assert server.fingerprint == "ours"
    states[4].output_ids.append(80)
    states[1].output_ids += [40, 20]  # speculative decoding emits several
    steered(guide, flat_logits(5), states)
    first, second = server.requests
    names = [states[4].session, states[1].session]
    assert told(first) == [(names[0], 0, [1, 2, 3]), (names[1], 0, [9])]
    assert told(second) == [(names[0], 3, [80]), (names[1], 1, [40, 20])]
    assert [sorted(ids) for ids in asked(second)] == [[10, 20, 40, 80]] * 2  # the end is known


def test_no_rows_no_call() -> None:
    server = Server()
    assert guide_of(server).plan(flat_logits(2), {}) is None
    assert not server.requests
    assert server.fingerprint is None


def test_a_row_without_a_choice_tells_its_tokens_with_its_next_one() -> None:
    server = Server()
    guide, states = guide_of(server), {0: request(), 1: request()}
    assert guided_rows(guide, torch.cat([flat_logits(1), flat_logits(1, [10])]), states) == [0]
    states[1].output_ids.append(10)
    assert guided_rows(guide, flat_logits(2), states) == [0, 1]
    first, second = server.requests
    assert [len(ids) for ids in asked(first)] == [4]
    assert told(second)[1] == (states[1].session, 0, [*(states[1].prompt_ids or []), 10])


def test_what_is_forgotten_is_told_again_in_the_same_step() -> None:
    """Row 0 and 3 have different candidates: mixed up, they would be steered by the other's."""
    logits = torch.cat([flat_logits(3), flat_logits(1, [EOS, 11, 31, 300])])
    results = []
    for forget in (False, True):
        server = Server()
        guide = guide_of(server)
        states = {row: request(prompt=[row + 1]) for row in range(4)}
        steered(guide, logits, states)
        for state in states.values():
            state.output_ids.append(80)
        if forget:
            server.texts.pop(states[0].session)
            server.texts.pop(states[3].session)
        results.append(steered(guide, logits, states))
        assert len(server.requests) == (3 if forget else 2)
        assert all(state.sent == 2 for state in states.values())
    again = sorted(told(server.requests[-1]))
    assert again == sorted((states[row].session, 0, [row + 1, 80]) for row in (0, 3))
    assert torch.equal(*results)


def test_a_text_that_finds_no_room_is_without_values_alone() -> None:
    server = Server()
    guide = guide_of(server)
    states = {0: request(), 1: request()}
    server.unheld = {states[1].session}
    assert guided_rows(guide, flat_logits(2), states) == [0]
    assert len(server.requests) == 1
    assert [state.sent for state in states.values()] == [2, 0]


# ---- rows that are left alone


def test_a_token_not_known_yet_leaves_the_row_alone() -> None:
    """Asynchronous scheduling: -1 stands for a token that is still on its way."""
    server = Server()
    guide = guide_of(server)
    states = {0: request(), 1: request()}
    steered(guide, flat_logits(2), states)
    states[0].output_ids.append(-1)
    states[1].output_ids.append(40)
    assert guided_rows(guide, flat_logits(2), states) == [1]
    assert [session for session, *_ in told(server.requests[-1])] == [states[1].session]
    states[0].output_ids[:] = [80, 40]
    assert guided_rows(guide, flat_logits(2), states) == [0, 1]
    assert told(server.requests[-1])[0] == (states[0].session, 2, [80, 40])
    assert all(-1 not in tokens for r in server.requests for _, _, tokens in told(r))


@pytest.mark.parametrize(
    ("state", "guided"),
    [
        (request(prompt=[7] * 8), True),
        (request(prompt=[7] * 9), False),
        (request(prompt=[7] * 8, output=[80]), False),
        (request(prompt=[99]), True),
        (request(prompt=[100]), False),
        (request(prompt=[7], output=[100]), False),
        (request(prompt=[]), True),
    ],
)
def test_what_the_model_cannot_read_is_left_alone(state: RequestState, guided: bool) -> None:
    server = Server(vocab_size=100, max_position=9)
    assert guided_rows(guide_of(server), flat_logits(1), {0: state}) == [0] * guided
    assert len(server.requests) == guided


def test_without_prompt_ids_the_row_is_left_alone() -> None:
    """A prompt of embeddings."""
    state = request()
    state.prompt_ids = None
    server = Server()
    assert guided_rows(guide_of(server), flat_logits(1), {0: state}) == []
    assert not server.requests


def test_a_row_without_values_in_time_leaves_its_neighbours_theirs() -> None:
    server = Server()
    server.pending = [0]
    states = {0: request(), 1: request()}
    assert guided_rows(guide_of(server), flat_logits(2), states) == [1]
    assert all(state.sent == 2 for state in states.values())  # its text is there


# ---- sessions that are over


def test_closed_sessions_are_told_with_the_next_step() -> None:
    server = Server()
    guide = guide_of(server)
    gone, stays, never = request(), request(), request()
    steered(guide, flat_logits(2), {0: gone, 1: stays})
    guide.sessions.close(gone)
    guide.sessions.close(never)  # the server has not heard of it
    steered(guide, flat_logits(1), {0: stays})
    steered(guide, flat_logits(1), {0: stays})
    assert [r.closed for r in server.requests] == [[], [gone.session], []]


@pytest.mark.parametrize("left", [{}, {0: request(output=[-1])}])
def test_closed_sessions_are_told_also_when_no_row_is_guided(left: Any) -> None:
    server = Server()
    guide = guide_of(server)
    gone = request()
    steered(guide, flat_logits(1), {0: gone})
    guide.sessions.close(gone)
    for _ in range(2):
        guide.plan(flat_logits(1), left)
        settle(guide.sessions)
    assert [(r.sessions, r.closed) for r in server.requests[1:]] == [([], [gone.session])]
    assert not server.texts


def test_a_lost_message_loses_no_text() -> None:
    """Its closing is lost: a server that is asked about a session no more drops it by itself."""
    server = Server()
    sessions = sessions_of(server)
    gone, state = request(), request(prompt=[1, 2])
    valued(sessions, [gone, state])
    state.output_ids.append(80)
    sessions.close(gone)
    server.failures = [TimedOut("slow")]
    assert valued(sessions, [state]) == [False]
    assert isinstance(sessions.trouble, TimedOut)
    assert state.sent == 2
    state.output_ids.append(40)
    assert valued(sessions, [state]) == [True]
    assert sessions.trouble is None
    assert server.requests[-1].closed == []
    assert told(server.requests[-1]) == [(state.session, 2, [80, 40])]


def test_a_bug_is_raised_and_loses_no_text() -> None:
    server = Server()
    sessions, state = sessions_of(server), request(prompt=[1, 2])
    valued(sessions, [state])
    state.output_ids.append(80)
    server.failures = [RuntimeError("a bug")]
    with pytest.raises(RuntimeError, match="a bug"):
        valued(sessions, [state])
    assert valued(sessions, [state]) == [True]
    assert told(server.requests[-1]) == [(state.session, 2, [80])]


def test_a_failure_while_telling_again_loses_no_text() -> None:
    server = Server()
    sessions, states = sessions_of(server), [request(prompt=[1]), request(prompt=[2])]
    valued(sessions, states)
    server.texts.pop(states[1].session)
    for state in states:
        state.output_ids.append(80)
    server.failures = [None, TimedOut("slow")]
    assert valued(sessions, states) == [True, False]
    assert valued(sessions, states) == [True, True]
    assert [(start, tokens) for _, start, tokens in told(server.requests[-1])] == [
        (2, []),
        (0, [2, 80]),
    ]
