"""Ranges, parts of a completion, and steps that are not scored, with perfect values.

As in `toy.py` token 0 is the end and token x says that x more tokens are to come. MARK ends
the thinking.
"""

import contextlib
import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lenvm_vllm.engine.processor import LenvmLogitsProcessor
from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.target.admission import Limits, check_admission
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.text.parts import Markers
from lenvm_vllm.values.client import TimedOut
from tests.support import fakes
from tests.support.toy import (
    EOS,
    LENGTHS,
    NO_LIMIT,
    Server,
    V,
    asked,
    request,
    sample,
    told,
)
from tests.support.toy import toy_logits as answer_logits

MARK = 390
quick = settings(deadline=None, max_examples=5)


def rows_of(server: Any) -> EngineRows:
    return EngineRows(fakes.config(max_scored=64), client=fakes.replicas_of(server))


def wanted(target: dict[str, Any], **fields: Any) -> RequestState:
    free = {"tolerance": None, "max_kl": NO_LIMIT}
    return request(free | target, markers=Markers(think_end=(MARK,)), **fields)


def steered(rows: EngineRows, logits: Tensor, *states: RequestState) -> Tensor:
    logits = logits.clone()
    rows.steer_inplace(logits, dict(enumerate(states)))
    return logits


def write(
    rows: EngineRows,
    states: list[RequestState],
    logits_of: Callable[[RequestState, random.Random], Tensor],
    seed: int = 0,
) -> None:
    """All texts to their ends."""
    rng = random.Random(seed)
    for _ in range(1000):
        running = [state for state in states if state.output_ids[-1:] != [EOS]]
        if not running:
            return
        logits = torch.stack([logits_of(state, rng) for state in running])
        for state, row in zip(running, steered(rows, logits, *running), strict=True):
            state.output_ids.append(sample(row, state.temperature, rng))
    raise AssertionError("a text does not end")


def logits_from(weights: dict[int, float]) -> Tensor:
    logits = torch.full((V,), -math.inf)
    logits[list(weights)] = torch.tensor(list(weights.values())).log()
    return logits


def thinking_logits(state: RequestState, rng: random.Random) -> Tensor:
    """Random tokens and, at any time, the marker; after it `answer_logits`."""
    if MARK in state.output_ids:
        return answer_logits(state, rng)
    return logits_from({length: math.exp(rng.random()) for length in LENGTHS} | {MARK: 2.0})


# ---- a range


@quick
@given(st.integers(0, 99), st.sampled_from(["project", "greedy"]), st.integers(1, 60))
def test_perfect_values_land_in_the_range(seed: int, policy: str, low: int) -> None:
    target = {"mode": "range", "min_tokens": low, "max_tokens": low + 15, "policy": policy}
    target["tolerance"] = 0.1
    states = [wanted(target) for _ in range(6)]
    write(rows_of(Server()), states, answer_logits, seed)
    assert all(low <= len(state.output_ids) <= low + 15 for state in states)


def test_a_range_leaves_the_model_its_choice() -> None:
    states = [wanted({"mode": "range", "min_tokens": 20, "max_tokens": 60}) for _ in range(20)]
    write(rows_of(Server()), states, answer_logits)
    assert len({len(state.output_ids) for state in states}) > 5


def test_the_rails_of_a_range_need_no_values() -> None:
    target = {"mode": "range", "min_tokens": 5, "max_tokens": 8, "tolerance": 0.1}
    states = [wanted(target) for _ in range(20)]
    write(rows_of(fakes.Server(TimedOut("slow"))), states, answer_logits)
    assert {len(state.output_ids) for state in states} <= {5, 6, 7, 8}


# ---- the answer alone


@quick
@given(st.integers(0, 99), st.sampled_from([1, 2, 32, 80]))
def test_the_answer_is_counted_from_the_marker(seed: int, tokens: int) -> None:
    states = [wanted({"tokens": tokens, "scope": "answer"}) for _ in range(6)]
    server = Server()
    write(rows_of(server), states, thinking_logits, seed)
    for state in states:
        start = state.output_ids.index(MARK) + 1
        assert len(state.output_ids) - start == tokens
    # The thinking is told at once, when it is over.
    first = {session: tokens for r in server.requests[::-1] for session, _, tokens in told(r)}
    for state in states:
        start = state.output_ids.index(MARK) + 1
        assert first[state.session] == state.prompt_ids + state.output_ids[:start]


def test_the_thinking_before_a_guided_answer_is_the_models_own() -> None:
    logits = thinking_logits(state := wanted({"tokens": 9, "scope": "answer"}), random.Random(0))
    server = Server()
    assert torch.equal(steered(rows_of(server), logits[None], state)[0], logits)
    assert not server.requests


@pytest.mark.parametrize(
    ("prompt", "output", "generated"),
    [
        ([7], [], 0),
        ([7], [1, 2], 0),
        ([7], [1, MARK], 0),
        ([7], [1, MARK, 5], 1),
        ([7], [1, MARK, 5, MARK], 2),  # the first one counts
        ([7, MARK, 5], [8, 8], 2),  # a prompt that switches the thinking off
        ([7, MARK, 5, 5, 5, 5, 5], [8, 8], 2),
        ([MARK, 1, EOS, 3, 4], [8, 8], 0),  # an earlier turn's
    ],
)
def test_where_the_answer_starts(prompt: Any, output: Any, generated: int) -> None:
    state = wanted({"tokens": 9, "scope": "answer"}, prompt=prompt, output=output)
    assert state.generated == generated
    assert state.counts == (MARK in output or (MARK in prompt and EOS not in prompt))


def test_a_prefix_counts() -> None:
    state = wanted({"tokens": 9, "prefix_tokens": 4}, prompt=[7, 5, 5, 5, 5], output=[5, 5])
    assert (state.generated, state.length) == (6, 7)
    state.output_ids.append(EOS)
    state.renew()
    assert state.outcome() == (7, 9)


def test_a_marker_that_is_not_known_yet() -> None:
    state = wanted({"tokens": 9, "scope": "answer"}, output=[1, -1])
    assert not state.counts
    state.output_ids[-1] = MARK
    state.output_ids.append(-1)
    state.renew()
    assert (state.counts, state.generated) == (True, 1)


# ---- the thinking alone


def thought_logits(state: RequestState, rng: random.Random) -> Tensor:
    """As `answer_logits`, with the marker for the end; after it an end at any time."""
    if MARK in state.output_ids:
        return logits_from({EOS: 0.3, 5: 0.7})
    logits = answer_logits(state, rng)
    logits[[MARK, EOS]] = logits[[EOS, MARK]]
    return logits


@quick
@given(st.integers(0, 99), st.sampled_from([1, 2, 32, 80]))
def test_the_thinking_lands_on_its_marker(seed: int, tokens: int) -> None:
    states = [wanted({"tokens": tokens, "scope": "thinking"}) for _ in range(6)]
    write(rows_of(Server()), states, thought_logits, seed)
    assert all(state.output_ids.index(MARK) + 1 == tokens for state in states)


def test_rails_of_the_thinking() -> None:
    """Neither the marker nor the text's end before the lower one; the marker alone at the upper."""
    rows = fakes.rails_only(rows_of(Server()))
    target = {"tokens": 4, "tolerance": 0.25, "scope": "thinking"}
    logits = torch.zeros(1, V)
    for generated, blocked in ((1, {MARK, EOS}), (2, set()), (4, set(range(V)) - {MARK})):
        after = steered(rows, logits, wanted(target, output=[9] * generated))
        assert set(after[0].isneginf().nonzero()[:, 0].tolist()) == blocked
    over = wanted(target, output=[9, MARK])
    assert torch.equal(steered(rows, logits, over), logits)


# ---- steps that are not scored


def test_only_each_third_token_is_scored() -> None:
    server = Server()
    rows, state = rows_of(server), wanted({"tokens": 30, "every": 3})
    logits = logits_from({EOS: 1.0, 10: 1.0, 20: 1.0})[None]
    for token in range(1, 8):
        steered(rows, logits, state)
        state.output_ids.append(token)
    assert [tokens for r in server.requests for _, _, tokens in told(r)] == [
        [7, 50],
        [1, 2, 3],
        [4, 5, 6],
    ]


def test_a_step_without_a_doubt_is_not_scored() -> None:
    """ln 2 is the entropy of two equal candidates."""
    server = Server()
    rows, state = rows_of(server), wanted({"tokens": 30, "min_entropy": math.log(2) + 0.01})
    sure, doubtful = {10: 1.0, 20: 1.0}, {10: 1.0, 20: 1.0, EOS: 0.1}
    logits = logits_from(sure)[None]
    assert torch.equal(steered(rows, logits, state), logits)
    assert not server.requests
    state.output_ids.append(10)
    other = wanted({"tokens": 30})
    steered(rows, torch.stack([logits_from(sure), logits_from(sure)]), state, other)
    assert [told(r) for r in server.requests] == [[(other.session, 0, [7, 50])]]
    steered(rows, logits_from(doubtful)[None], state)
    assert told(server.requests[-1]) == [(state.session, 0, [7, 50, 10])]
    assert [sorted(ids) for ids in asked(server.requests[-1])] == [[10, 20]]


# ---- admission


@pytest.mark.parametrize("scope", ["thinking", "answer"])
def test_a_part_needs_a_known_marker(scope: str) -> None:
    target = LengthTarget.parse({"tokens": 9, "scope": scope})
    config = fakes.config()
    with pytest.raises(ValueError, match=rf"length_target\.scope: '{scope}' .*--reasoning-parser"):
        check_admission(target, Limits(), config)
    for ids in ([5], [5, 6]):
        config.reasoning_config = SimpleNamespace(
            natural_reasoning_end_token_ids=ids, reasoning_start_token_ids=[4]
        )
        # min_tokens is about the completion
        check_admission(target, Limits(min_tokens=500), config)
    config.reasoning_config = None
    config.additional_config = {"lenvm": {"thinking_end_ids": [5]}}
    check_admission(target, Limits(), config)


def test_a_text_longer_than_the_context() -> None:
    """Also for a stream that sets no max_tokens."""
    config = fakes.config()
    check_admission(LengthTarget.parse(1000), Limits(), config)  # its lower rail fits
    with pytest.raises(ValueError, match=r"needs at least 1080 tokens; the context has 1000"):
        check_admission(LengthTarget.parse(1200), Limits(), config)


@pytest.mark.parametrize(
    ("target", "budget", "taken"),
    [
        ({"tokens": 50, "scope": "thinking"}, 44, True),  # the marker is the 45th token
        ({"tokens": 50, "scope": "thinking"}, 43, False),
        ({"tokens": 50, "scope": "thinking", "tolerance": None}, 1, True),
        ({"tokens": 50, "scope": "answer"}, 1, True),
        ({"tokens": 50}, 1, True),
    ],
)
def test_a_budget_that_ends_the_thinking_too_early(target: Any, budget: int, taken: bool) -> None:
    config = fakes.config()
    config.additional_config = {"lenvm": {"thinking_end_ids": [5]}}
    flat = LengthTarget.parse(target).to_xargs()
    refused = pytest.raises(ValueError, match=f"thinking_token_budget: {budget} .* at least 45")
    with contextlib.nullcontext() if taken else refused:
        check_admission(LengthTarget.parse(target), Limits(thinking_token_budget=budget), config)
    with contextlib.nullcontext() if taken else refused:
        LenvmLogitsProcessor.validate_params(
            fakes.params(flat, thinking_token_budget=budget, max_tokens=None)
        )
