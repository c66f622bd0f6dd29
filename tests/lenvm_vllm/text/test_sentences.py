"""Where a sentence ends, and which tokens end one."""

from typing import Any

import pytest
import torch

from lenvm_vllm.text.letters import texts_of
from lenvm_vllm.text.sentences import Sentences, ends_sentence
from tests.support.real_tokenizers import NAMES, real
from tests.support.tiny import tiny_tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "It ends.",
        'He said "no."',
        "Really?**",
        "完了。",
        "كيف حالك؟",
        "यह अंत है।",
        "Այո։",  # noqa: RUF001
        "ጨርሷል።",
        "ပြီးပါပြီ။",
        "ចប់ហើយ។",
        "Τι κάνεις;",  # noqa: RUF001
        "เสร็จแล้ว ",
        "ສຳເລັດແລ້ວ\n",
        "```python\nx = 1\n```",
        "  ```\n```",
        "(so.)  \n",
        "</b> Yes!</p>",
        "In the year 1999.",
        "1. First.",
        "- He met Dr. Who.",
        "wait...",
        "It is so.[1]",
        "It is so.[12][^3]",
    ],
)
def test_sentence_ends(text: str) -> None:
    assert ends_sentence(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "It goes on and", "Firstly,", "a. b", "- item", "3.5", "x = 1;", "εδώ, "),
        *("1.", "Steps:\n3.", "Steps:\n  12.", "- a.", "**4.**", "\nIV.", "> 2."),
        *("He met Mr.", "with Prof.", "(e.g.", "see Fig.", "z.B.", "by J.", "by J. R."),
        *("```", "Code:\n```", "```\nx\n```\nand\n```", "the `x", "x = 1\n```"),
        *("เสร็จแล้ว", "word ", "word\n"),
    ],
)
def test_no_sentence_ends(text: str) -> None:
    assert not ends_sentence(text)


def sentences() -> tuple[Any, Sentences]:
    tokenizer = tiny_tokenizer()
    return tokenizer, Sentences(tokenizer, texts_of(tokenizer))


def test_tokens_that_may_end_a_sentence() -> None:
    tokenizer, found = sentences()
    assert found.ids == sorted(found.ids)
    assert set(tokenizer.encode(".!?` ", add_special_tokens=False)) <= set(found.ids)
    assert not set(tokenizer.encode('so,([")*', add_special_tokens=False)) & set(found.ids)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("It ends.", True),
        ("Steps:\n3.", False),
        ('He said "no."', False),  # it has before the quote
        ('He said "', False),
        ("It ends!!", False),
        ("These are:\n.", False),  # nothing has been said behind the colon
        ("- one\n6. !", False),
        ("However,.", False),
        ("It is (so.", True),
        ("wait...", False),
        ("It ends! 😊.", False),  # it has before the emoji
        ("It ends.\n", False),  # the next one begins
        ("เสร็จแล้ว ", True),
        ("x" * 100 + "\n3.", False),
        ("x" * 100 + "3.", True),
        ("- one\n", True),  # an item of a list
        ("2) two\n", True),
        ("- one:\n", False),
        ("- It ends.\n", False),  # it has already
        ("-\n", False),
        ("A line\n", False),
        ("```\nx.", False),  # code
        ("```\nx\n", True),  # a line of code
        ("```\nx\n\n", False),
        ("```\nx\n`", True),  # what closes the block, or begins to
        ("x\n`", False),
        ("It is \\( 3.", False),  # in a formula
        ("It is \\( 3 \\).", True),
    ],
)
def test_the_text_before_a_token_tells(text: str, ends: bool) -> None:
    tokenizer, found = sentences()
    *before, token = tokenizer.encode(text, add_special_tokens=False)
    assert found.ends(before, [token]) == [ends]


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("It ends.", True),
        ("It ends.\n", True),
        ("A line\n", True),
        ("It goes", False),
        ("", False),
        ("\n\n", False),  # nothing has been said
        ("...", False),
        ("--\n", False),
        ("These are:\n", False),
        ("One,\n", False),
        ("Steps:\n3.", False),
        ("```\nx = 1\n", False),  # inside of a code block
        ("```\nx = 1\n" + "y = 2\n" * 9, False),
        ("```\nx = 1\n```", True),
        ("```\nx = 1\n```\n", True),
        ("```\nx = 1\n```\n" + "It ends. " * 9 + "\n```py\nx.", False),
        ("- one\n", True),
        ("- one\n-\n", False),
        ("- one\n3.\n", False),
        ("# Title\n", False),
        ("**These are:**\n", False),
        ("这些是：\n", False),  # noqa: RUF001
        ("So it is:\n\\[\n", False),  # in a formula
        ("So it is:\n$$\n", False),
        ("It is \\( 3.", False),
        ("\\[\nx = 3.\n", False),
        ("\\[\nx = 3\n\\]\n", True),
        ("$$\nx = 3\n$$\n", True),
        ("It is \\( 3 \\).", True),
        ("A `\\[` opens one.", True),
        ("```\nre.match('\\(')\n```\n", True),
        ("Have a great day! 😊", True),
        ("Done!👍🏽👩‍🚀 🇩🇪", True),
        ("I like it 😊", False),
        ("| a | b |\n|---|:-:|\n", False),
        ("| a | b |\n|---|---|\n| 1 | 2 |\n", True),
    ],
)
def test_a_whole_text(text: str, whole: bool) -> None:
    tokenizer, found = sentences()
    assert found.is_whole(tokenizer.encode(text, add_special_tokens=False)) is whole


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It goes", 7),
        ("It ends. It ends.", 8.5),
        ("- one\n- two\n", 6),
        ("v3.5 is it.", 11),
        ("It ends.\n\nIt ends.\n\n", 10),  # a break after a full stop ends nothing more
        ("1. One.\n2. Two.\n", 8),
        ("He met Mr. Wu.", 14),
        ("完了。完了。", 9),
        ("It is.[1] So.[2]", 8),
        ("x" * 800 + ". " + "It ends. " * 20, 160 / 18),  # what is long ago does not count
        ("", 0),
    ],
)
def test_tokens_a_sentence(text: str, tokens: float) -> None:
    """A token is a byte here."""
    tokenizer, found = sentences()
    assert found.tokens_a_sentence(tokenizer.encode(text, add_special_tokens=False)) == tokens


@pytest.mark.parametrize(("after", "whole"), [("[", False), (" ", True)])
def test_a_sentence_is_not_whole_before_a_mark_that_cites(after: str, whole: bool) -> None:
    tokenizer, found = sentences()
    own = torch.zeros(len(tokenizer))
    own[tokenizer.encode(after, add_special_tokens=False)] = 20
    text = tokenizer.encode("It is so.", add_special_tokens=False)
    assert found.is_whole(text, own) is whole


@pytest.mark.parametrize("name", NAMES)
def test_a_mark_behind_the_end_of_a_sentence_ends_none(name: str) -> None:
    """Nor does a tag, of a model whose markers are not special tokens."""
    tokenizer = real(name)
    found = Sentences(tokenizer, texts_of(tokenizer) | {7: "<tool_call>", 8: "</think>", 9: "好。"})
    assert not {7, 8} & set(found.ids)
    text = tokenizer.encode("It is the world.", add_special_tokens=False)
    assert found.is_whole(text)
    assert found.ends(text, [9]) == [True]
    marks = [token for token in found.ids if found.ends(text, [token])[0]]
    assert not {tokenizer.decode([token]).strip() for token in marks} & {*".!?…", '"', ")", "**"}


def test_what_is_begun_too_late() -> None:
    tokenizer, found = sentences()

    def late(text: str, last: bool) -> str:
        tokens = found.begun_too_late(tokenizer.encode(text, add_special_tokens=False), last)
        return tokenizer.decode(sorted(tokens))

    assert late("- one\n", last=False) == late("- one", last=True) == "`"
    assert late("It ends.\n", last=True) == "`"  # what begins there may be a number
    assert late("```\nx\n", last=False) == ""
    assert {*"#*-1`"} <= {*late("- one\n", last=True)}
