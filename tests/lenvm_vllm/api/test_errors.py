"""HTTP 400: what is wrong is named, before vLLM gets the request, in the form of each route."""

import itertools
from typing import Any

import pytest

from lenvm_vllm.api.routes import CHAT, INVOCATIONS, MESSAGES, PATHS, RESPONSES, ROUTES, TEXT
from tests.support.through import post

TAKING = [path for path in PATHS if path == INVOCATIONS or not ROUTES[path].refusal]
REFUSING = [path for path in PATHS if path not in TAKING]
BEST_OF_3 = {"tokens": 5, "best_of": 3}


@pytest.mark.parametrize("path", REFUSING)
def test_doors_that_cannot_take_a_length(path: str) -> None:
    for asked in ({"length_target": 5}, {"vllm_xargs": {"length_target": 5}}):
        app, status, answer = post(asked, path=path)
        assert (status, app.scope) == (400, None)
        assert f"length_target: not on {path}: " in answer["error"]["message"]
    assert post({"items": []}, path=path)[1] == 200


def test_a_400_has_the_form_of_its_door() -> None:
    assert post({"length_target": 0}, path=MESSAGES)[2]["type"] == "error"
    assert set(post({"length_target": 0})[2]) == {"error"}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"length_target": 0}, ["length_target.tokens", "got 0"]),
        ({"length_target": True}, ["length_target", "got True"]),
        ({"length_target": {"tokens": 5, "tolerence": 0}}, ["length_target.tolerence", "got 0"]),
        ({"length_target": {"mode": "near", "tokens": 5}}, ["length_target.mode", "'near'"]),
        ({"length_taget": 5}, ["length_taget", "got 5"]),
        ({"lengthTarget": 5}, ["lengthTarget", "got 5", "length_target at the top level"]),
        ({"target_length": 5}, ["target_length", "got 5"]),
        ({"extra_body": {"length_target": 5}}, ["extra_body.length_target", "got 5", "top level"]),
        ({"extra_body": {"length_mode": "tilt"}}, ["extra_body.length_mode"]),
        ({"length_target": 5, "extra_body": {"length_target": 5}}, ["extra_body.length_target"]),
        ({"vllm_xargs": {"lengthTarget": 5}}, ["lengthTarget: unknown field"]),
        ({"length_target": {"sentences": 8}}, ["length_target.sentences", "unknown unit", "got 8"]),
        ({"length_target": "80 words"}, ["length_target", "'80 words'"]),
        ({"length_target": {"tokens": 9, "tolerance": 10}}, ["tolerance: 10", "0.1 is 10%"]),
        ({"length_target": 5, "length_mode": "tilt"}, ["length_mode", "'tilt'"]),
        ({"length_target": 5, "vllm_xargs": {"length_mode": "tilt"}}, ["vllm_xargs.length_mode"]),
        ({"length_target": 5, "vllm_xargs": [1]}, ["vllm_xargs", "[1]"]),
        ({"vllm_xargs": {"length_target": 0}}, ["length_target.tokens", "got 0"]),
        ({"vllm_xargs": {"length_goal": 5}}, ["length_goal", "got 5"]),
        ({"length_target": 50, "max_tokens": 44}, ["max_tokens: 44", "at least 45"]),
        ({"length_target": 50, "max_completion_tokens": 44}, ["max_completion_tokens: 44"]),
        ({"vllm_xargs": {"length_target": 50}, "max_tokens": 44}, ["max_tokens: 44"]),
        ({"length_target": 50, "min_tokens": 55}, ["min_tokens: 55"]),
        ({"length_target": 50, "ignore_eos": True}, ["ignore_eos: true"]),
        ({"length_target": 5, "use_beam_search": True}, ["use_beam_search: true"]),
        ({"vllm_xargs": {"length_target": 5}, "use_beam_search": True}, ["use_beam_search: true"]),
        ({"length_target": 5, "prompt_embeds": "AAAA"}, ["prompt_embeds: not supported"]),
        ({"length_target": BEST_OF_3, "stream": True}, ["best_of: 3", "stream: True"]),
        ({"length_target": BEST_OF_3, "temperature": 0}, ["best_of: 3", "temperature: 0"]),
        ({"length_target": BEST_OF_3, "n": 4}, ["n: 4", "best_of: 3"]),
        ({"length_target": BEST_OF_3, "n": "2"}, ["n: '2'"]),
    ],
)
def test_wrong_field_is_a_400_that_names_it(body: Any, named: list[str]) -> None:
    app, status, answer = post(body)
    assert status == 400
    assert app.scope is None
    assert all(part in answer["error"]["message"] for part in named)
    assert answer["error"]["code"] == 400


def test_a_text_completion_has_sixteen_tokens_unless_it_says() -> None:
    """vLLM would say so too late for a stream."""
    for body in ({"length_target": 50}, {"vllm_xargs": {"length_target": 50}, "max_tokens": None}):
        _, status, answer = post(body, path="/v1/completions")
        assert (status, "max_tokens: 16" in answer["error"]["message"]) == (400, True)
    assert post({"length_target": 50, "max_tokens": 50}, path="/v1/completions")[1] == 200
    assert post({"length_target": 50})[1] == 200


def test_each_door_has_its_own_name_for_the_most_tokens() -> None:
    """A name that vLLM ignores there is no limit: of a text completion 16 is."""
    names = {"max_completion_tokens", "max_tokens", "max_output_tokens"}
    own = {CHAT: names - {"max_output_tokens"}, TEXT: {"max_tokens"}}
    own |= {RESPONSES: {"max_output_tokens"}, MESSAGES: {"max_tokens"}}
    for path, name in itertools.product(own, sorted(names)):
        _, status, answer = post({"length_target": 50, name: 44}, path=path)
        if name in own[path]:
            assert (status, answer["error"]["message"].split(" ")[:2]) == (400, [f"{name}:", "44"])
        else:
            assert status == (400 if path == TEXT else 200)
    _, status, answer = post({"length_target": 50, "max_completion_tokens": 80}, path=TEXT)
    assert (status, "max_tokens: 16 " in answer["error"]["message"]) == (400, True)
    both = {"length_target": 50, "max_tokens": 44, "max_completion_tokens": 80}
    assert post(both)[1] == 200


def test_best_of_is_for_answers_that_have_choices() -> None:
    for path in sorted({*TAKING} - {CHAT, TEXT, INVOCATIONS}):
        _, status, answer = post({"length_target": BEST_OF_3}, path=path)
        assert (status, "best_of: 3: only" in answer["error"]["message"]) == (400, True)
