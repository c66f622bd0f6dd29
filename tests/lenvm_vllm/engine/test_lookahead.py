"""Values of all tokens by one query a text. They are those of exact scoring (`toy.py`), so the two
must steer alike; what differs is what is asked, and when."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from lenvm_vllm.engine.guide import Guide
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.values.replicas import Replicas
from tests.support.toy import (
    Server,
    V,
    asked,
    flat_logits,
    guide_of,
    looking,
    renew,
    request,
    sessions_of,
    settle,
    steered,
    tell,
    told,
    valued,
    values,
)
from tests.support.waiting import of, two

TARGETS: tuple[Any, ...] = (
    40,
    {"tokens": 40, "policy": "greedy"},
    {"mode": "at_most", "tokens": 5},
    {"mode": "at_least", "tokens": 90},
    {"mode": "tilt", "beta": -20.0},
)


def states_of() -> dict[int, RequestState]:
    return {row: request(target, prompt=[row + 1]) for row, target in enumerate(TARGETS)}


def tell_ahead(guide: Guide, states: Iterable[RequestState]) -> None:
    """Before a step of vLLM's whose length is known."""
    guide._pace.step_s = 1.0
    renew(states)
    guide.tell(states)
    settle(guide.sessions)


def run(guide: Guide, ahead: bool, steps: int = 4) -> list[torch.Tensor]:
    """The logits of some steps of the same texts."""
    torch.manual_seed(0)
    states, found = states_of(), []
    for step in range(steps):
        if ahead:
            tell_ahead(guide, states.values())
        found.append(steered(guide, 2 * torch.randn(len(states), V), states))
        for row, state in states.items():
            state.output_ids.append(10 + row + step)
    return found


# ---- the same values


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("scoring", ["auto", "landing"])
def test_it_steers_as_exact_scores_of_all_candidates_do(scoring: str, ahead: bool) -> None:
    exact = guide_of(Server(by_text=True), scored_mass=1.0, max_scored=64)
    guide = guide_of(looking(), scoring=scoring, scored_mass=1.0, max_scored=64)
    for one, other in zip(run(guide, ahead), run(exact, False), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_servers_of_both_kinds_and_of_different_gamma_beside_each_other() -> None:
    plain, ahead = Server(by_text=True), Server(by_text=True, lookahead_rank=2, gamma=0.999)
    states, replicas = two(plain, ahead)
    sessions = sessions_of(replicas)
    for step in range(3):
        tell(sessions, states, 1.0)
        z = values(sessions, states)
        lengths = torch.nn.functional.softplus(z) / -torch.tensor(replicas_gamma(replicas)).log()
        biases = [plain.bias_of(text_of(s)) for s in states]
        for state, mine, bias in zip(states, lengths, biases, strict=True):
            if bias == 0:
                assert mine.tolist() == pytest.approx([10, 20, 40, 80], rel=1e-3)
            state.output_ids.append(step + 1)
        assert not z.isnan().any()
    assert all(sum(r.candidate_counts) == 0 for r in ahead.requests)
    assert all(r.lookahead_rank == 0 for r in plain.requests)
    assert any(of(plain, states))
    assert any(of(ahead, states))


def replicas_gamma(replicas: Replicas) -> float:
    return replicas.model(lambda: "ours").gamma


def text_of(state: RequestState) -> list[int]:
    return [*(state.prompt_ids or []), *state.output_ids]


# ---- what is asked


def test_a_query_a_row_and_no_candidate() -> None:
    server = looking()
    run(guide_of(server), ahead=False)
    assert [r.lookahead_rank for r in server.requests] == [2] * 4
    assert not any(r.candidates for r in server.requests)


def test_told_ahead_a_step_asks_nothing_more() -> None:
    server = looking()
    guide, states = guide_of(server), states_of()
    steered(guide, torch.randn(len(states), V), states)  # the model is known
    for step in range(3):
        for state in states.values():
            state.output_ids.append(10 + step)
        tell_ahead(guide, states.values())
        assert len(server.requests) == step + 2
        steered(guide, torch.randn(len(states), V), states)
        assert all(state.valued for state in states.values())
    assert [len(r.sessions) for r in server.requests] == [len(TARGETS)] * 4
    assert all(r.budget_ms for r in server.requests)


def test_rows_that_were_not_told_ahead_are_asked_in_the_step() -> None:
    """One is new; of another a token was on its way, so that nothing was asked ahead."""
    server = looking()
    sessions, states = sessions_of(server), [request(prompt=[n + 1]) for n in range(3)]
    valued(sessions, states[:2])
    states[0].output_ids.append(80)
    states[1].output_ids.append(-1)
    tell(sessions, states[:2], 1.0)
    settle(sessions)
    states[1].output_ids[:] = [40]
    assert valued(sessions, states) == [True] * 3
    (step,) = server.requests[1:]
    assert [t[1:] for t in told(step)] == [(1, [80]), (1, [40]), (0, [3])]


@pytest.mark.parametrize(("last", "step_s"), [(-1, 1.0), (80, 0.0)])
def test_a_long_prompt_is_told_without_a_question_where_the_step_asks(
    last: int, step_s: float
) -> None:
    """Else a server that computes the prompt would leave the running text without values."""
    server = looking()
    sessions, running, new = sessions_of(server), request(), request(prompt=[9] * 100)
    valued(sessions, [running])
    running.output_ids.append(last)
    tell(sessions, [running, new], step_s)
    settle(sessions)
    message = server.requests[-1]
    assert [t[0] for t in told(message)] == [new.session]
    assert (message.lookahead_rank, message.budget_ms) == (0, 0)
    running.output_ids[:] = [80]
    assert valued(sessions, [running, new]) == [True, True]


def test_only_in_the_landing_candidates_are_asked_too() -> None:
    server = looking()
    guide = guide_of(server, scoring="landing")
    states = {0: request(30, output=[50] * 10), 1: request(30, output=[50] * 28)}
    exact = guide_of(Server(by_text=True))
    # Unscored candidates count with the mean of the others, as where all is exact.
    logits = flat_logits(2) + torch.arange(V) / 100
    expected = steered(exact, logits, {1: request(30, output=[50] * 28)})
    after = steered(guide, logits, states)
    torch.testing.assert_close(after[1], expected[1])
    assert [len(ids) for ids in asked(server.requests[-1])] == [0, 4]
    assert server.requests[-1].lookahead_rank == 2
    for state in states.values():
        state.output_ids.append(50)
    tell_ahead(guide, states.values())
    steered(guide, logits, states)
    ahead, step = server.requests[1:]
    assert (ahead.lookahead_rank, step.lookahead_rank) == (2, 0)  # its queries are there
    assert step.sessions == [states[1].session]


def test_exact_scores_that_do_not_come_leave_those_of_lookahead() -> None:
    server = looking()
    guide = guide_of(server, scoring="landing")
    state = request(30, output=[50] * 28)
    steered(guide, flat_logits(1), {0: state})
    state.output_ids.append(50)
    tell_ahead(guide, [state])
    server.pending = [0]
    steered(guide, flat_logits(1), {0: state})
    assert state.valued


def test_scoring_by_settings() -> None:
    server = looking()
    sessions = sessions_of(Replicas({"http://values": server}, looks_ahead=False))
    assert valued(sessions, [request()]) == [True]
    assert server.requests[0].lookahead_rank == 0


def test_a_row_that_has_no_turn_is_not_told_ahead() -> None:
    server = looking()
    sessions = sessions_of(server)
    every = request({"tokens": 30, "every": 2}, output=[80])
    valued(sessions, [every])
    tell(sessions, [every], 1.0)
    every.output_ids.append(40)
    tell(sessions, [every], 1.0)
    settle(sessions)
    assert [t[1:] for r in server.requests for t in told(r)] == [(0, [7, 50, 80]), (3, [40])]
