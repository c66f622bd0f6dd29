"""What a word is."""

import pytest

from value_server.contract.units import WORDS, count, follow_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        (" \n", 0),
        ("Hello, world - again.", 4),
        ("it's e.g. x=1", 3),
        ("你好，世界。", 4),  # noqa: RUF001
        ("“你好”", 2),
        ("第3章", 3),
        ("AI模型 and GPU", 5),
        ("カタカナー", 5),
        ("ﾊﾟ", 1),
        ("안녕 하세요", 2),
        ("สวัสดี ครับ", 2),
        ("😀 你好😀", 3),
        ("«Да», сказал он", 3),
    ],
)
def test_what_a_word_is(text: str, words: int) -> None:
    assert count(text, WORDS) == words
    for cut in range(len(text) + 1):
        before, place = follow_words(text[:cut])
        assert before + follow_words(text[cut:], place)[0] == words
