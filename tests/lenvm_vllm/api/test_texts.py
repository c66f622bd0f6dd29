"""The texts of an answer, in whichever form its route has."""

from lenvm_vllm.api.texts import texts_of


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
