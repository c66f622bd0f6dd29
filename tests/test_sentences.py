"""Where a sentence ends, and which tokens end one."""

import pytest

from lenvm_vllm.sentences import closing_ids, ends_sentence
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "It ends.",
        'He said "no."',
        "Really?**",
        "完了。",
        "كيف حالك؟",
        "यह अंत है।",
        "x = 1\n```",
        "(so.)  \n",
        "</b> Yes!</p>",
    ],
)
def test_sentence_ends(text: str) -> None:
    assert ends_sentence(text)


@pytest.mark.parametrize("text", ["", "It goes on and", "Firstly,", "a. b", "- item", "3.5"])
def test_no_sentence_ends(text: str) -> None:
    assert not ends_sentence(text)


def test_closing_tokens_are_those_whose_text_ends_a_sentence() -> None:
    tokenizer = tiny_tokenizer()
    found = closing_ids(tokenizer)
    assert found == sorted(found)
    assert tokenizer.encode(".", add_special_tokens=False)[-1] in found
    assert not any(i in found for i in tokenizer.encode("so", add_special_tokens=False))
