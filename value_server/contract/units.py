"""The units that a length can have: the only definition of what a word and a character are.

tokens: of the served model, the end-of-sequence token included.
characters: code points, what `len(text)` counts in Python.
words: runs between white space, what `len(text.split())` counts, and each ideograph or kana one.
Punctuation behind an ideograph belongs to it. Thai and its like, which put no space between
words, have one word between two spaces.
"""

import unicodedata
from functools import lru_cache

import regex

WORDS, CHARACTERS = "words", "characters"
UNITS = ("tokens", WORDS, CHARACTERS)

# Tokens that one of them takes in plain English, as long as nothing is known of a text.
PRIOR = {WORDS: 1.4, CHARACTERS: 0.23}
# Tokens of a text that are worth as much as the prior is. Tokens and not words or characters,
# since a sentence in another script has many of them and should count for more.
_WEIGHT = 10

# Where a text stands: outside of a word, in one, behind an ideograph, or behind marks with
# which a word began that has no letter yet.
OUT, IN, IDEOGRAPH, MARKS = range(4)
# Kinds of characters: white space, ideographs and kana, letters and digits, all others.
_SPACE, _IDEOGRAPH, _LETTER, _OTHER = range(4)
# [place][kind] → (words more, place behind it)
_STEPS = (
    ((0, OUT), (1, IDEOGRAPH), (1, IN), (1, MARKS)),
    ((0, OUT), (1, IDEOGRAPH), (0, IN), (0, IN)),
    ((0, OUT), (1, IDEOGRAPH), (1, IN), (0, IDEOGRAPH)),
    ((0, OUT), (0, IDEOGRAPH), (0, IN), (0, MARKS)),
)
_IDEOGRAPHS = regex.compile(
    r"[[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\u30fc\uff70]--\p{S}]", regex.VERSION1
)


@lru_cache(1 << 16)  # a request may have all of Unicode
def _kind(character: str) -> int:
    if character.isspace():
        return _SPACE
    if _IDEOGRAPHS.match(character):
        return _IDEOGRAPH
    marks = unicodedata.category(character) == "Lm"  # what changes the letter before it
    return _LETTER if character.isalnum() and not marks else _OTHER


def follow_words(text: str, place: int = OUT) -> tuple[int, int]:
    """Words that begin in a text whose beginning stands at `place`, and the place of its end."""
    words = 0
    for character in text:
        more, place = _STEPS[place][_kind(character)]
        words += more
    return words, place


def count(text: str, unit: str) -> int:
    """Words or characters of a text."""
    return len(text) if unit == CHARACTERS else follow_words(text)[0]


def tokens_per_unit(unit: str, tokens: int, amount: int) -> float:
    """Tokens that a word or a character takes in a text, by what is known of it.

    amount: units of it that took so many `tokens`; the fewer these, the more the prior counts.
    """
    found = tokens / amount if amount else PRIOR[unit]
    return (_WEIGHT * PRIOR[unit] + tokens * found) / (_WEIGHT + tokens)
