"""Which answers can be continued, and for which target."""

from typing import Any

import pytest

from lenvm_vllm.api.continuation import can_continue, narrowed
from lenvm_vllm.target.request import LengthTarget

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}]}


def test_rails_that_are_off_stay_off() -> None:
    target = LengthTarget.parse({"tokens": 100, "tolerance": None, "endings": 4})
    assert narrowed(target) == target


# What other fields do is said in test_fields.py.
@pytest.mark.parametrize("fields", [{"stop": "x"}, {"n": 2}, {"temperature": 0}])
def test_what_cannot_be_continued(fields: dict[str, Any]) -> None:
    target = LengthTarget.parse(100)
    plain = {"stream": False, "stop": [], "n": None, "response_format": {"type": "text"}}
    assert can_continue(HELLO | plain, target)
    assert not can_continue(HELLO | fields, target)


@pytest.mark.parametrize(
    ("prompt", "whether"),
    [
        *(("a", True), ([1, 2], True), (["a"], True), ([[1]], True)),
        *((["a", "b"], False), ([[1], [2]], False), ([["a"]], False), ([None], False)),
    ],
)
def test_one_prompt_can_be_continued(prompt: Any, whether: bool) -> None:
    assert can_continue({"prompt": prompt}, LengthTarget.parse(9)) is whether


@pytest.mark.parametrize(
    "target",
    [
        {"mode": "tilt", "beta": 1.0},
        {"tokens": 9, "scope": "answer"},
        {"tokens": 9, "prefix_tokens": 3},
        {"tokens": 9, "mode": "at_least"},  # one that goes on ends by itself
    ],
)
def test_targets_that_have_no_end_to_move(target: dict[str, Any]) -> None:
    assert not can_continue(HELLO, LengthTarget.parse(target))
