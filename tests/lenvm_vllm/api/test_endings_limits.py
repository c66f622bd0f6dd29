"""Limits of an answer, written by its client or not, are those of its stream and its endings."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lenvm_vllm.api.continuation import Draft, continuation
from lenvm_vllm.api.endings import TAIL
from lenvm_vllm.api.held_streams import HOLD
from lenvm_vllm.api.outcome import Outcome
from lenvm_vllm.api.routes import CHAT, TEXT
from lenvm_vllm.target.request import LengthTarget
from tests.support.engine_side import BAD, App, Tokenizer, Told, answer_of, round_of, serve
from tests.support.streaming import KEEP_ALIVE, Heard, Streaming
from tests.support.through import post_to

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}]}
AT_MOST = {"mode": "at_most", "tokens": 500}
BAD_END = Told(100, BAD, forced=True)


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Its configuration."""
    monkeypatch.setenv("LENVM_ENDINGS_PATIENCE", "1000")
    config: SimpleNamespace = serve(monkeypatch, tmp_path).model_config
    return config


def sent_at_98(**fields: Any) -> int:
    """Tokens that are sent of a stream when it has so many."""
    app = Streaming(Told(99), more={99: KEEP_ALIVE})
    heard = app.answer(HELLO | {"length_target": AT_MOST} | fields)
    return len(Heard(heard.body.split(KEEP_ALIVE)[0]).text)


def room_of_endings(path: str, **fields: Any) -> tuple[int, int]:
    """Where another ending of 100 tokens begins, and its limit."""
    app = App([BAD_END], round_of(*[(TAIL, 0.5)] * 4))
    post_to(app, {"length_target": AT_MOST} | fields, path)
    wish = app.asked[1][1]
    return len(wish["prompt"]) - 2, wish["max_tokens"]


@pytest.mark.parametrize("said", [[1], {}, math.nan, "x"])
def test_what_is_no_limit_is_left_to_vllm(said: Any) -> None:
    assert sent_at_98(max_tokens=said) == 98


def test_a_limit_is_read_as_vllm_does() -> None:
    assert sent_at_98(max_tokens="100") == sent_at_98(max_tokens=100) == 98 - HOLD
    assert room_of_endings(CHAT, **HELLO, max_tokens="100") == (68, 32)


def test_the_room_behind_a_prompt_is_one(model: SimpleNamespace) -> None:
    model.max_model_len = 102  # and a prompt of two
    assert sent_at_98() == 98 - HOLD
    assert room_of_endings(CHAT, **HELLO) == (68, 32)


def test_so_is_what_the_operator_sets(model: SimpleNamespace) -> None:
    model.override_generation_config = {"max_new_tokens": 100}
    assert sent_at_98() == sent_at_98(max_tokens=400) == 98 - HOLD
    assert room_of_endings(CHAT, **HELLO) == (68, 32)


def test_a_text_completion_has_one_of_its_own() -> None:
    app = App([Told(16, BAD, forced=True)], round_of(*[(16, 0.5)] * 4))
    post_to(app, {"length_target": AT_MOST, "prompt": "?"}, TEXT)
    assert app.asked[1][1]["max_tokens"] == 16


def wish_behind(target: Any, cut: int, **fields: Any) -> Any:
    """Of a text of 200 tokens."""
    outcome = Outcome(200, "a" * 199, limited=False, stopped=False, step=None)
    draft = Draft(answer_of(CHAT, [Told(200)]), outcome, Tokenizer())
    request = {"vllm_xargs": {}} | fields
    return continuation(request, LengthTarget.parse(target), draft, cut, 4, 998)


@pytest.mark.parametrize("target", [180, {"characters": 180}])
def test_behind_the_target_the_rails_are_not_nearer(target: Any) -> None:
    before, behind = (wish_behind(target, cut)["vllm_xargs"] for cut in (168, 185))
    assert before["length_tolerance"] < behind["length_tolerance"] == 0.1
    assert wish_behind(180, 185)["max_tokens"] == 198 - 185


def test_other_numbers_are_read_as_vllm_does_too() -> None:
    wish = wish_behind(180, 168, min_tokens="170", seed="7")
    assert (wish["min_tokens"], wish["seed"]) == (2, 8)
