"""The texts of an answer, in whichever form its route has."""

from typing import Any

import pytest

from lenvm_vllm.api.texts import Text, texts_of


def test_what_a_response_thinks_is_none_of_its_text() -> None:
    thought = {"type": "reasoning_text", "text": "Let me think of it."}
    said = {"type": "output_text", "text": "It is so."}
    answer = {
        "object": "response",
        "status": "completed",
        "output": [
            {"type": "reasoning", "content": [thought]},
            {"type": "function_call", "arguments": "{}"},
            {"type": "message", "content": [said]},
        ],
        "usage": {"output_tokens": 11},
    }
    (text,) = texts_of(answer)
    assert (text.text, text.count) == ("It is so.", 11)


@pytest.mark.parametrize(
    ("body", "cut"),
    [
        ({"finish_reason": "stop"}, {"finish_reason": "length"}),
        ({"finish_reason": "tool_calls"}, {"finish_reason": "tool_calls"}),
        ({"stop_reason": "end_turn"}, {"stop_reason": "max_tokens"}),
        ({"stop_reason": "tool_use"}, {"stop_reason": "tool_use"}),
    ],
)
def test_a_text_with_a_call_is_not_called_cut(body: dict[str, Any], cut: dict[str, Any]) -> None:
    Text(body, None, None, "Let me look", False, False).call_cut()
    assert body == cut
