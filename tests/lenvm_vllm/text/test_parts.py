"""Thinkings and tool calls within a completion: what counts, what is held and what is forced.

Legend: EOS 0. <think> is 30, </think> 31 (or 28 29, a marker of two tokens); a call is 26 … 27.
"""

from typing import Any

import pytest
import torch

from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.settings import Settings
from lenvm_vllm.target.admission import Limits, check_admission, markers_of, resolved
from lenvm_vllm.target.request import LengthTarget, LengthTargetError
from lenvm_vllm.text.parts import Markers, Parts, call_markers
from lenvm_vllm.values.client import TimedOut
from tests.support.fakes import EOS, Server, V, config, rails_only, replicas_of
from tests.support.tiny import THINKING, tiny_tokenizer

THINK, OVER, CALL, CALLED = 30, 31, 26, 27
MARKERS = Markers((THINK,), (OVER,), {CALL: CALLED})
TWO = Markers((THINK,), (28, 29), {CALL: CALLED})


def request(
    target: Any, output: Any = (), prompt: Any = (7,), markers: Markers = MARKERS, **fields: Any
) -> RequestState:
    wanted = LengthTarget.parse(target)
    return RequestState(wanted, list(prompt), list(output), [EOS], markers, **fields)


def open_tokens(state: RequestState, closed: Any = (), server: Any = None) -> list[int]:
    """The tokens that are left of a step in which all but `closed` are possible."""
    rows = EngineRows(config(), replicas_of(server or Server()))
    rows = rows if server else rails_only(rows)
    logits = torch.zeros(1, V)
    logits[0, list(closed)] = -torch.inf
    rows.steer_inplace(logits, {0: state})
    return logits[0].isfinite().nonzero()[:, 0].tolist()


def closed_tokens(state: RequestState) -> list[int]:
    return sorted(set(range(V)) - set(open_tokens(state)))


# ---- what is a thinking


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [
        ([7, THINK], True),
        ([7, THINK, 5, 5], True),
        ([7, THINK, 5, OVER], False),
        ([7, THINK, 5, OVER, *[5] * 50], False),  # prefilled, however long ago
        ([7], False),  # it has yet to begin
        ([THINK, 5, OVER, 5, EOS, 7, THINK], True),
        ([THINK, 5, EOS, 7, THINK, OVER, 5], False),
        ([7, THINK, 5, OVER, 5, THINK, 5], True),
    ],
)
def test_whether_a_prompt_leaves_a_thinking_open(prompt: Any, thinking: bool) -> None:
    assert request(9, prompt=prompt).parts.thinking is thinking


def test_values_do_not_decide_whether_the_model_thinks() -> None:
    """Where nothing has told yet, the first token is its own; then it is the answer's."""
    server = Server()
    target = {"tokens": 9, "scope": "answer", "tolerance": None}
    assert len(open_tokens(request(target), server=server)) == V
    assert server.last is None
    for output, prompt in (([5], [7]), ([], [7, THINK, OVER])):
        assert len(open_tokens(request(target, output, prompt), server=server)) < V
        assert request(target, output, prompt).generated == len(output)
    assert request(target, [THINK, 5]).generated == 0


def test_a_second_thinking_is_one() -> None:
    output = [5, OVER, 5, 5, THINK, 5, OVER, 5, EOS]
    thinking, answer, all_of_it = (
        request({"tokens": 9, "scope": scope}, output, [7, THINK])
        for scope in ("thinking", "answer", "completion")
    )
    assert [s.generated for s in (thinking, answer, all_of_it)] == [5, 4, 9]
    assert [s.outcome() for s in (thinking, answer, all_of_it)] == [(5, 9), (4, 9), (9, 9)]
    for upto, counts in ((0, True), (2, False), (4, False), (5, True), (7, False)):
        state = request({"tokens": 9, "scope": "thinking"}, output[:upto], [7, THINK])
        assert state.counts is counts, upto


def test_markers_of_several_tokens() -> None:
    state = request({"tokens": 9, "scope": "answer"}, [5, 28, 5, 28, 29, 5], [THINK], TWO)
    assert (state.generated, state.parts.thought) == (1, 5)
    parts = Parts(Markers((1, 2), (3, 3, 4)), [9])
    for token in (1, 1, 2, 3, 3, 3):
        parts.follow(token)
    assert (parts.thinking, parts.thought, parts.closed) == (True, 5, 2)
    parts.follow(4)
    assert (parts.thinking, parts.thought, parts.closed) == (False, 6, 0)


def test_markers_of_the_served_model() -> None:
    class Reasoning:
        natural_reasoning_end_token_ids = (5, 6)
        reasoning_start_token_ids = (4,)

    served = config()
    assert markers_of(served, Settings()) == Markers()
    served.reasoning_config = Reasoning
    assert markers_of(served, Settings()) == Markers((4,), (5, 6))
    assert markers_of(served, Settings(thinking_end_ids=(8, 9))).think_end == (8, 9)
    tokenizer = tiny_tokenizer(("<tool_call>", "</tool_call>", "[TOOL_CALLS]"))
    tokens = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]")
    start, end, alone = tokenizer.convert_tokens_to_ids(tokens)
    assert call_markers(tokenizer) == {start: end, alone: None}
    assert call_markers(tiny_tokenizer(THINKING)) == {}


# ---- the default scope


def test_where_the_model_thinks_the_answer_is_what_counts() -> None:
    class Reasoning:
        natural_reasoning_end_token_ids = (5,)
        reasoning_start_token_ids = (4,)

    plain, thinks = config(), config()
    thinks.reasoning_config = Reasoning

    def scope(value: Any, served: Any) -> str:
        return str(resolved(LengthTarget.parse(value), served).scope)

    assert [scope(60, served) for served in (None, plain, thinks)] == [
        "completion",
        "completion",
        "answer",
    ]
    assert scope({"tokens": 60, "scope": "completion"}, thinks) == "completion"
    assert scope({"tokens": 60, "prefix_tokens": 5}, thinks) == "completion"
    with pytest.raises(LengthTargetError, match=r"best_of: 3 .* model reasons"):
        resolved(LengthTarget.parse({"tokens": 60, "best_of": 3}), thinks)
    # What went through once is not asked again.
    flat = resolved(LengthTarget.parse(60), thinks).to_xargs()
    assert resolved(LengthTarget.from_extra_args(flat) or LengthTarget(), thinks).scope == "answer"
    whole = LengthTarget.parse({"tokens": 60, "scope": "completion"}).to_xargs()
    assert resolved(LengthTarget.from_extra_args(whole) or LengthTarget(), thinks).scope == (
        "completion"
    )


# ---- no thinking is left open


def write(state: RequestState, token: int = 5, longest: int = 400) -> list[int]:
    """A model that goes on with `token` wherever it may."""
    rows = EngineRows(config(), replicas_of(Server(TimedOut("slow"))))
    while state.output_ids[-1:] != [EOS] and len(state.output_ids) < longest:
        logits = torch.zeros(1, V)
        logits[0, token] = 20.0
        rows.steer_inplace(logits, {0: state})
        state.output_ids.append(int(logits.argmax()))
    return state.output_ids


@pytest.mark.parametrize("markers", [MARKERS, TWO])
@pytest.mark.parametrize(
    ("target", "length", "thinking"),
    [
        # A quarter of the whole is left for the answer, and two tokens at least.
        ({"mode": "at_most", "tokens": 60}, 60, 45),
        ({"mode": "at_most", "tokens": 6}, 6, 4),
        ({"tokens": 100, "tolerance": 0.0}, 100, 75),
        ({"tokens": 100}, 110, 83),
    ],
)
def test_a_completion_closes_its_thinking(
    markers: Markers, target: Any, length: int, thinking: int
) -> None:
    state = request(target | {"scope": "completion"}, prompt=[THINK], markers=markers)
    text = write(state)
    assert len(text) == length
    end = list(markers.think_end)
    assert text[thinking - len(end) : thinking] == end
    assert text.count(end[-1]) == text.count(EOS) == 1


@pytest.mark.parametrize(
    ("target", "most", "thinking", "length"),
    [
        ({"tokens": 100}, 300, 210, 300),  # room for the lower rail
        ({"mode": "at_most", "tokens": 100}, 300, 275, 300),  # a quarter of it
        ({"mode": "at_least", "tokens": 40}, 300, 260, 300),
        ({"tokens": 100}, 95, 5, 95),
    ],
)
def test_a_thinking_leaves_the_answer_its_room(
    target: Any, most: int, thinking: int, length: int
) -> None:
    state = request(target | {"scope": "answer"}, prompt=[THINK], max_tokens=most)
    text = write(state)
    assert text.index(OVER) + 1 == thinking
    assert (len(text), text[-1]) == (length, EOS)


def test_no_end_in_an_open_thinking_that_counts() -> None:
    assert closed_tokens(request({"tokens": 20, "scope": "completion"}, [5] * 8, [THINK])) == [EOS]
    assert closed_tokens(request({"tokens": 20, "scope": "completion"}, [5] * 18, [7])) == []
    without = {"tokens": 20, "scope": "completion", "tolerance": None}
    assert closed_tokens(request(without, [5] * 8, [THINK])) == []


@pytest.mark.parametrize("markers", [MARKERS, TWO])
@pytest.mark.parametrize("tokens", [0, 1, 2, 9])
def test_a_limited_thinking(markers: Markers, tokens: int) -> None:
    end = list(markers.think_end)
    target = {"mode": "at_most", "tokens": tokens, "scope": "thinking"}
    text = write(request(target, prompt=[THINK], markers=markers), longest=20)
    thought = max(tokens, len(end))
    assert text[:thought] == [5] * (thought - len(end)) + end
    assert text[thought:] == [5] * (20 - thought)
    # One that begins later is over as soon; a second one has what is left, which is none.
    begun = request(target, [5, 5, THINK, *[5] * max(0, tokens - len(end) - 1)], markers=markers)
    assert open_tokens(begun) == [end[0]]
    again = request(target, [*text[:thought], 5, THINK], [THINK], markers)
    assert open_tokens(again) == [end[0]]


def test_none_is_as_a_budget_of_none() -> None:
    LengthTarget.parse({"tokens": 0, "scope": "thinking"})
    check_admission(LengthTarget.parse({"tokens": 0, "scope": "thinking"}), Limits(100))
    for wrong in (0, {"tokens": 0, "scope": "answer"}, {"mode": "at_most", "tokens": 0}):
        with pytest.raises(LengthTargetError, match=r"length_target\.tokens: .* got 0"):
            LengthTarget.parse(wrong)


# ---- tool calls


def test_the_tokens_of_a_call_do_not_count() -> None:
    state = request(20, [5, 5, CALL, 6, 6, 6, CALLED, 5])
    assert (state.generated, state.parts.called, state.parts.calls) == (3, 5, 1)
    assert request({"tokens": 20, "scope": "answer"}, [5, CALL, 6, 6], [7]).generated == 1


def test_a_call_is_not_cut_and_not_held_open() -> None:
    exact = {"tokens": 6, "tolerance": 0.0}
    before, inside = [5, 5], [CALL, *[6] * 30]
    assert closed_tokens(request(exact, before)) == [EOS]
    # Inside a call the rails say nothing, though 33 tokens are out.
    assert closed_tokens(request(exact, before + inside)) == []
    # Behind it the end may come at once, below the lower rail; the text may also go on.
    whole = [*before, *inside, CALLED]
    assert closed_tokens(request(exact, whole)) == []
    assert open_tokens(request(exact, [*whole, 5, 5, 5])) == [EOS]
    # None begins where the end is due.
    assert open_tokens(request(exact, [5] * 5)) == [EOS]


def test_values_do_not_move_a_call() -> None:
    server = Server()
    target = {"tokens": 6, "scope": "completion", "tolerance": None}
    for output in ([5, CALL, 6], [5, CALL, 6, CALLED]):
        assert closed_tokens(request(target, output)) == []
        assert len(open_tokens(request(target, output), server=server)) == V
    assert server.last is None


def test_a_call_that_only_the_end_ends() -> None:
    state = request(6, [5, CALL, *[6] * 30], markers=Markers(calls={CALL: None}))
    assert closed_tokens(state) == []
    assert state.parts.in_call


def test_a_grammar_has_the_last_word_and_it_is_known() -> None:
    """A JSON that is not whole at its rail goes on; one that is whole ends below it."""
    at_most = request({"mode": "at_most", "tokens": 4}, [5, 5, 5])
    assert open_tokens(at_most, closed=[EOS, 6]) == sorted(set(range(V)) - {EOS, 6})
    assert not at_most.gave_way  # not known yet
    at_most.output_ids.append(-1)
    at_most.renew()
    assert not at_most.gave_way
    at_most.output_ids[-1] = 9
    at_most.renew()
    assert at_most.gave_way
    open_tokens(at_most, closed=[6])
    at_most.output_ids.append(EOS)
    at_most.renew()
    assert at_most.gave_way
    done = request({"mode": "at_least", "tokens": 40}, [5, 5, 5])
    assert open_tokens(done, closed=range(1, V)) == [EOS]
    assert not done.gave_way
