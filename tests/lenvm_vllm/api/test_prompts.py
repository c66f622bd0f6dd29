"""The text of a prompt, in whichever parts it comes."""

from typing import Any

import pytest

from lenvm_vllm.api.prompts import text_of


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hi", "hi"),
        ([{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}], "a\nb"),
        (["a", {"text": "b"}], "a\nb"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        ([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}], "a"),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}], None),
        ([{"type": "text", "text": "a", "image_url": "x"}], None),
        ([{"type": "text"}], None),
        ([7], None),
        (None, None),
        ({"text": "a"}, None),
    ],
)
def test_text_of_parts(content: Any, text: str | None) -> None:
    assert text_of(content) == text
