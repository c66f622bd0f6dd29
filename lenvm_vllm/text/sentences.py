"""Where a sentence ends: the place to end a text at."""

from collections.abc import Sequence
from typing import Any

import regex

_TAIL = 24  # tokens that tell what stands before one, a line or so

_CLOSERS = r"""(?:["'*_`\p{Pe}\p{Pf}]|</?\w+>)*"""
_TERMINAL = regex.compile(rf"[\p{{Sentence_Terminal}}…]{_CLOSERS}$")
_GREEK_QUESTION = regex.compile(rf"\p{{Greek}}\s*[;\u037e]{_CLOSERS}$")
# Thai and Lao sentences have no mark: a space ends one.
_SPACE = regex.compile(r"[\p{Thai}\p{Lao}][\p{Thai}\p{Lao}\p{M}]*\s+$")
_FENCE = regex.compile(r"^[ \t]*```", regex.MULTILINE)
_NUMBERED = regex.compile(r"(?:^|\n)[ \t>#*_-]*\(?(?:\d{1,3}|\p{L}|[ivxlcIVXLC]{1,5})\.[*_]*$")
_ABBREVIATION = regex.compile(
    r"(?:^|[\s(\"'“„«.])(?:\p{Lu}|Mr|Mrs|Ms|Mx|Messrs|Dr|Drs|Prof|Rev|Hon|Gen|Col|Maj|Capt|Lt|Sgt"
    r"|Sen|Rep|Gov|St|Mt|Ft|Fig|Figs|Eq|Vol|No|Nos|Nr|Art|Sec|Ch|pp?|vs|cf|ca|al|approx|est|e\.g|i\.e"
    r"|eg|ie|z\.B|d\.h|u\.a|bzw|ggf|vgl|evtl|Mme|Mlle|Mgr|Sra?|Sres|Dra|Srta|Ud|Uds|Sig)\.$"
)
_ENDS = regex.compile(rf"[\p{{Sentence_Terminal}}…]{_CLOSERS}(?=\s|$)|\n+")
# What ends a sentence behind the right text: a fence, a Greek semicolon, a space, what closes.
_MAY_END = regex.compile(rf"(?:[\p{{Sentence_Terminal}}…;\u037e]{_CLOSERS}|```|\s+)$")
_CLOSES = regex.compile(rf"{_CLOSERS}$")


def ends_sentence(text: str) -> bool:
    """Whether it stops at the end of a sentence or of a code block, behind quotes and the like.

    text: as much as tells a number of a list from a sentence, and an opening fence from a
    closing one.
    """
    if _SPACE.search(text):
        return True
    text = text.rstrip()
    if text.endswith("```"):
        fences = len(_FENCE.findall(text))
        return fences > 0 and fences % 2 == 0
    if _GREEK_QUESTION.search(text):
        return True
    return bool(_TERMINAL.search(text)) and not (
        _NUMBERED.search(text) or _ABBREVIATION.search(text)
    )


def may_end_sentence(token: str) -> bool:
    """Whether a sentence may end with this token, if the right text stands before it."""
    return bool(token) and bool(_MAY_END.search(token) or _CLOSES.fullmatch(token.strip()))


class Sentences:
    """The tokens with which a sentence may end, and whether one does."""

    def __init__(self, tokenizer: Any, texts: dict[int, str]) -> None:
        """texts: of each token in the middle of a text."""
        self._tokenizer = tokenizer
        self._fences = {i for i, text in texts.items() if "```" in text}
        self._spaces = {i for i, text in texts.items() if text.isspace()}
        self.ids = sorted(i for i, text in texts.items() if may_end_sentence(text))

    def is_whole(self, text: Sequence[int]) -> bool:
        """Whether it stops at the end of a sentence, of a line or of a code block."""
        tail = str(self._tokenizer.decode(list(text[-_TAIL:])))
        if not tail.strip() or not (tail.endswith("\n") or ends_sentence(tail)):
            return False
        whole = str(self._tokenizer.decode(list(text)))
        fences = len(_FENCE.findall(whole))
        return fences % 2 == 0 and not whole.rstrip().endswith((":", ","))

    def tokens_a_sentence(self, text: Sequence[int]) -> float:
        """Of the sentences, or lines, that it has so far; all of it where it has none."""
        whole = str(self._tokenizer.decode(list(text)))
        return len(text) / max(1, len(_ENDS.findall(whole)))

    def ends(self, text: Sequence[int], token: int) -> bool:
        """Whether a sentence of `text` ends with `token`."""
        # Only a whole text tells which of its fences open.
        before = text if token in self._fences else text[-_TAIL:]
        whole = str(self._tokenizer.decode([*before, token]))
        # Behind a full stop a space begins what follows.
        return bool(_SPACE.search(whole)) if token in self._spaces else ends_sentence(whole)
