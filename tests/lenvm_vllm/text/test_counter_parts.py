"""Words and characters of a completion that has thinkings: its markers are no text."""

import pytest
from vllm.sampling_params import SamplingParams

from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.target.request import HAS_CALLS, LengthTarget
from lenvm_vllm.text.letters import Letters
from lenvm_vllm.text.parts import Markers
from tests.support import fakes
from tests.support.real_tokenizers import real
from value_server.contract.units import count

END = 2
TOKENIZER = real("byte-level")


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


START, OVER = ids("<think>"), ids("</think>")  # three tokens each
MARKERS = Markers(tuple(START), tuple(OVER))
LETTERS = Letters(TOKENIZER, MARKERS)


def request(unit: str, scope: str, prompt: list[int], output: list[int]) -> RequestState:
    target = LengthTarget.parse({unit: 10, "scope": scope, "mode": "at_most"})
    counter = LETTERS.counter(unit, specials=False)
    return RequestState(target, prompt, output, [END], MARKERS, counter)


@pytest.mark.parametrize("unit", ["words", "characters"])
@pytest.mark.parametrize(
    ("scope", "parts"),
    [
        ("thinking", ["So we"]),
        ("answer", ["Fine </ think> x"]),
        ("completion", ["So we", "Fine </ think> x"]),
    ],
)
def test_a_marker_is_no_text_and_what_looks_like_it_is(
    unit: str, scope: str, parts: list[str]
) -> None:
    text = [*START, *ids("So we"), *OVER, *ids("Fine </ think> x")]
    state = request(unit, scope, ids("Say"), [])
    for token in text:
        state.output_ids.append(token)
        state.renew()
        _ = state.amount  # token by token, and all at once
    whole = request(unit, scope, ids("Say"), text)
    assert state.amount == whole.amount == sum(count(part, unit) for part in parts)


@pytest.mark.parametrize("unit", ["words", "characters"])
def test_a_marker_that_began_at_the_limit_is_gone_on_with(unit: str) -> None:
    full = ids(
        "one two three four five six seven eight nine ten "[: None if unit == "words" else 10]
    )
    for begun in range(3):
        state = request(unit, "thinking", START, [*full, *OVER[:begun]])
        assert state.force() == [OVER[begun]]
        assert not state.gave_way
        assert state.amount == 10
    done = request(unit, "thinking", START, [*full, *OVER])
    assert (done.amount, done.outcome(), done.gave_way) == (10, (10, 10), False)


def test_what_vllm_runs_behind_the_end_takes_nothing_back() -> None:
    for text in ("", "Fine"):
        state = request("characters", "completion", ids("Say"), [*ids(text), END, *START])
        assert state.amount == len(text)


@pytest.mark.parametrize("with_tools", [False, True])
def test_a_call_is_text_where_nobody_takes_it_out(
    with_tools: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, end = ids("<|im_start|>")[0], ids("{")[0]  # as if they were those of calls
    markers = Markers(calls={start: end})
    monkeypatch.setattr("lenvm_vllm.engine.rows.tokenizer_of", lambda config: TOKENIZER)
    monkeypatch.setattr("lenvm_vllm.engine.rows.markers_of", lambda *_: markers)
    xargs = LengthTarget.parse({"characters": 9, "mode": "at_most"}).to_xargs()
    made = SamplingParams(extra_args=xargs | {HAS_CALLS: int(with_tools)})
    state = EngineRows(fakes.config(), fakes.replicas_of(fakes.Server())).open(
        made, ids("Say"), [start, *ids("one two three")]
    )
    assert state is not None
    assert state.amount == (0 if with_tools else len("one two three"))
    assert state.is_limited is not with_tools
