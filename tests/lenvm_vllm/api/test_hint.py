"""The length said in the prompt: in whose words, and behind which message."""

from typing import Any

import pytest

from lenvm_vllm.api.hint import say
from lenvm_vllm.api.request_field import take
from lenvm_vllm.api.routes import CHAT, RESPONSES, TEXT, route_at
from lenvm_vllm.target.request import LengthTarget, LengthTargetError


def said(request: dict[str, Any], path: str = CHAT, **target: Any) -> LengthTarget | None:
    request["length_target"] = {"hint": True} | target
    return take(request, route_at(path, request), path)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "Be kind."}, {"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("text", "target", "line"),
    [
        ("Hi.", {"words": 50}, "Answer in about 50 words."),
        ("Hi.", {"words": 50, "mode": "at_most"}, "Answer in at most 50 words."),
        ("Hi.", {"characters": 280, "mode": "at_least"}, "Answer in at least 280 characters."),
        ("Hi.", {"mode": "range", "min_words": 5, "max_words": 9}, "Answer in 5 to 9 words."),
        ("Hi.", {"tokens": 141}, "Answer in about 100 words."),
        ("Hi.", {"tokens": 2}, "Answer in about 1 words."),
        ("你好", {"words": 50}, "请用大约50个字回答。"),
        ("日本語で", {"words": 50}, "約50字で答えてください。"),
        ("안녕", {"words": 50, "mode": "at_most"}, "50단어 이내로 답해 주세요."),
        ("Hallo.", {"words": 50, "hint": "Kurz, bitte."}, "Kurz, bitte."),
        ("Hi.", {"words": 50, "hint": "true"}, "Answer in about 50 words."),
    ],
)
def test_it_is_said_in_the_users_words(text: str, target: dict[str, Any], line: str) -> None:
    request: dict[str, Any] = {"messages": user(text)}
    told = said(request, **target)
    assert told is not None
    assert told.hint == line
    assert request["messages"] == user(f"{text}\n\n{line}")
    assert "length_hint" not in request["vllm_xargs"]


def test_behind_pictures_it_is_a_part_of_its_own() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "What?"}]
    request: dict[str, Any] = {"messages": user(parts)}
    said(request, words=50)
    line = {"type": "text", "text": "Answer in about 50 words."}
    assert request["messages"][-1]["content"] == [*parts, line]


@pytest.mark.parametrize("given", ["Hi.", [{"role": "user", "content": "Hi."}]])
def test_a_response_has_an_input(given: Any) -> None:
    request: dict[str, Any] = {"input": given}
    said(request, RESPONSES, words=50)
    assert request["input"] == [{"role": "user", "content": "Hi.\n\nAnswer in about 50 words."}]


@pytest.mark.parametrize(
    ("request_", "path", "target"),
    [
        ({"prompt": "Hi.", "max_tokens": 200}, TEXT, {}),
        ({"messages": [*user("Hi."), {"role": "assistant", "content": "Yes,"}]}, CHAT, {}),
        ({"messages": []}, CHAT, {}),
        ({"messages": user("Hi.")}, CHAT, {"prefix_tokens": 4}),
    ],
)
def test_where_there_is_nothing_to_say_it_behind(
    request_: dict[str, Any], path: str, target: dict[str, Any]
) -> None:
    with pytest.raises(LengthTargetError, match=r"length_target\.hint: True cannot be said"):
        said(request_, path, words=50, **target)


@pytest.mark.parametrize("target", [{"mode": "tilt", "beta": 1.0}, {"scope": "thinking"}])
def test_it_says_the_length_of_an_answer(target: dict[str, Any]) -> None:
    tokens = {} if "beta" in target else {"tokens": 50}
    with pytest.raises(LengthTargetError, match="hint: True says the length of an answer"):
        said({"messages": user("Hi.")}, **tokens, **target)


def test_a_prepared_prompt_has_none() -> None:
    request: dict[str, Any] = {"vllm_xargs": {"length_target": 50, "length_hint": "Short."}}
    with pytest.raises(LengthTargetError, match="length_hint: unknown field"):
        take(request, route_at(CHAT, request), CHAT)


def test_a_character_that_is_none_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lone surrogate, which a tokenizer does not take; of a long text the end tells enough."""
    seen = []

    class Tokenizer:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            seen.append(text.encode())
            return [0] * 14

    monkeypatch.setattr("lenvm_vllm.api.hint.tokenizer_of", lambda config: Tokenizer())
    target = LengthTarget.parse({"tokens": 141, "hint": True})
    request = {"messages": user("a " * 5000 + "\ud83d")}
    assert str(say(request, target, object()).hint).startswith("Answer in about")
    assert len(seen[0]) == 4000
