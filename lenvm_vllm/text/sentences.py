"""Where a sentence, a line or a code block ends: the places to end a text at."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import regex

from lenvm_vllm.steering.constants import GOES_ON
from lenvm_vllm.text.blocks import FENCE, Blocks
from lenvm_vllm.text.tokenizer import decoded

if TYPE_CHECKING:
    from torch import Tensor

_TAIL = 32  # tokens that tell what stands before one, a line or so
_RECENT = 160  # tokens whose sentences tell how long the next one will be

_EMOJI = r"\p{Extended_Pictographic}\p{Regional_Indicator}"
# Quotes, brackets, emoji and their joints, marks that cite, as in "It is so.[1]", and tags.
_CLOSERS = (
    rf"""(?:["'*_`\p{{Pe}}\p{{Pf}}{_EMOJI}\p{{Emoji_Modifier}}\u200d\ufe0f]| (?=[{_EMOJI}])"""
    r"|\[\^?\d{1,3}\]|</?\w+>)*"
)
_TERMINAL = regex.compile(rf"[\p{{Sentence_Terminal}}…]{_CLOSERS}$")
_GREEK_QUESTION = regex.compile(rf"\p{{Greek}}\s*[;\u037e]{_CLOSERS}$")
# Thai and Lao sentences have no mark: a space ends one.
_SPACE = regex.compile(r"[\p{Thai}\p{Lao}][\p{Thai}\p{Lao}\p{M}]*\s+$")
_NUMBERED = regex.compile(r"(?:^|\n)[ \t>#*_-]*\(?(?:\d{1,3}|\p{L}|[ivxlcIVXLC]{1,5})\.[*_]*$")
_ABBREVIATION = regex.compile(
    r"(?:^|[\s(\"'“„«.])(?:\p{Lu}|Mr|Mrs|Ms|Mx|Messrs|Dr|Drs|Prof|Rev|Hon|Gen|Col|Maj|Capt|Lt|Sgt"
    r"|Sen|Rep|Gov|St|Mt|Ft|Fig|Figs|Eq|Vol|No|Nos|Nr|Art|Sec|Ch|pp?|vs|cf|ca|al|approx|est|e\.g|i\.e"
    r"|eg|ie|z\.B|d\.h|u\.a|bzw|ggf|vgl|evtl|Mme|Mlle|Mgr|Sra?|Sres|Dra|Srta|Ud|Uds|Sig)\.$"
)
# Of scripts that put no space behind it, a full stop ends a sentence wherever it stands.
_ENDS = regex.compile(
    rf"[[\p{{Sentence_Terminal}}…]--[!-~]]{_CLOSERS}|[.!?]{_CLOSERS}(?=\s|$)|\n", regex.V1
)
# Of formulas in LaTeX: the brackets around one, but in code, and a line above and below one.
_BRACKETS = regex.compile(r"`[^`\n]*`|(?<!\\)\\([\[\]()])")
_DOLLARS = regex.compile(r"^[ \t>]*\$\$[ \t]*$", regex.MULTILINE)
_SAYS = regex.compile(r"[\p{L}\p{N}]")
# Right behind a full stop they make it the point of 3.14, of example.com or of an abbreviation, or
# begin a mark that cites.
_INSIDE = regex.compile(r"[\p{Lu}\p{Ll}\p{N}\[]")
_MARK = r"(?:[-*+•‣–—]|\(?(?:\d{1,3}|\p{L})[.)])"  # noqa: RUF001
_ITEM = regex.compile(rf"^[ \t>]*{_MARK}[ \t]+[^\s].*")
# A line that something follows, or that says nothing yet: a heading, a bare mark of a list, the
# rule below the head of a table.
_LEADS_ON = regex.compile(
    rf"^[ \t>]*+(?:#{{1,6}}\s.*|{_MARK}?)[ \t]*$|^[\s>|:-]*$|[,:;(（，、：；–—-][*_\s]*$"  # noqa: RUF001
)
# A token that begins one of a list, or a heading, and says nothing yet.
_BEGINS = regex.compile(r"\s*(?:[-*+•‣#>–—]+|\(?\d{1,3}[.)]?)\s*")  # noqa: RUF001
# What ends a sentence behind the right text: a fence, a Greek semicolon, a space. Not a quote
# alone: the sentence has ended before it.
_MAY_END = regex.compile(rf"(?:[\p{{Sentence_Terminal}}…;\u037e]{_CLOSERS}|^\s*`+|\s+)$")


def ends_sentence(text: str) -> bool:
    """Whether it stops at the end of a sentence or of a code block, behind quotes and the like.

    text: as much as tells a number of a list from a sentence, and an opening fence from a
    closing one.
    """
    if _SPACE.search(text):
        return True
    text = text.rstrip()
    if text.endswith("```"):
        fences = len(FENCE.findall(text))
        return fences > 0 and fences % 2 == 0
    if _GREEK_QUESTION.search(text):
        return True
    return bool(_TERMINAL.search(text)) and not (
        _NUMBERED.search(text) or _ABBREVIATION.search(text)
    )


def may_end_sentence(token: str) -> bool:
    """Whether a sentence may end with this token, if the right text stands before it."""
    return bool(_MAY_END.search(token))


def _in_formula(text: str) -> bool:
    """Whether its last paragraph stops in a formula of LaTeX, where nothing is whole."""
    here = text.rstrip().rpartition("```")[2].rpartition("\n\n")[2]
    last = "".join(_BRACKETS.findall(here))[-1:]
    return last in ("[", "(") or len(_DOLLARS.findall(here)) % 2 == 1


def is_item(line: str) -> bool:
    """Whether it is one of a list, and says something."""
    return bool(_ITEM.match(line))


def is_whole(text: str) -> bool:
    """Whether it stops at the end of a sentence, of a line or of a code block, outside of any
    other and of a formula."""
    if len(FENCE.findall(text)) % 2 or not _SAYS.search(text) or _in_formula(text):
        return False
    if not text.endswith("\n"):
        return ends_sentence(text) and not _NUMBERED.search(text)
    line = text.rstrip().rpartition("\n")[2]
    return bool(line) and not _LEADS_ON.search(line)


def sentences_in(text: str) -> int:
    """How many sentences or lines end in it; a number of a list ends none."""
    number, start = 0, 0
    for end in _ENDS.finditer(text):
        piece = text[start : end.end()]
        stops = end[0] == "\n" or not (_NUMBERED.search(piece) or _ABBREVIATION.search(piece))
        if stops:
            number += bool(_SAYS.search(piece))
            start = end.end()
    return number


class Sentences:
    """The tokens with which a sentence may end, and whether one does."""

    def __init__(self, tokenizer: Any, texts: dict[int, str]) -> None:
        """texts: of each token in the middle of a text."""
        import torch  # the API server, which reads whole texts, does without

        self._tokenizer, self._texts = tokenizer, texts
        self.blocks = Blocks(tokenizer, texts)
        self._spaces = {i for i, text in texts.items() if text.isspace()}
        self.ids = sorted(i for i, text in texts.items() if may_end_sentence(text))
        # With which lines end that end no sentence.
        self.breaks = sorted(i for i in self._spaces if "\n" in texts[i])
        self.line = next((i for i in self.breaks if texts[i] == "\n"), None)
        self._marks = [i for i, text in texts.items() if _BEGINS.fullmatch(text)]
        inside = [i for i, text in texts.items() if _INSIDE.match(text)]
        self._inside = torch.tensor(inside, dtype=torch.long)
        # As `Blocks.text_of`.
        self._decoded = lru_cache(maxsize=1024)(lambda ids: decoded(tokenizer, list(ids)))

    def is_whole(self, text: Sequence[int], own: "Tensor | None" = None) -> bool:
        """As of the text that these tokens are.

        own: (V,) logits of the next token, which tell a full stop from a point.
        """
        if self.blocks.is_open(text):
            return False
        _, fence, tail = self._tail(text).rpartition("```")
        if fence and not tail.strip():  # that of a block which it closes
            return bool(_SAYS.search(self.blocks.text_of(tuple(text))))
        return is_whole(tail) and not (own is not None and tail[-1] == "." and self._goes_on(own))

    def _goes_on(self, own: "Tensor") -> bool:
        """Whether what stands right behind a full stop is most likely none of another sentence."""
        return bool(own.softmax(-1)[self._inside_of(len(own), own.device)].sum() > GOES_ON)

    @lru_cache(maxsize=8)  # noqa: B019  # copied to a device once, not at each full stop
    def _inside_of(self, size: int, on: Any) -> "Tensor":
        return self._inside[self._inside < size].to(on)

    def tokens_a_sentence(self, text: Sequence[int]) -> float:
        """Of its last sentences, or lines; all of it where it has none."""
        recent = list(text[-_RECENT:])
        return len(recent) / max(1, sentences_in(decoded(self._tokenizer, recent)))

    def ends(self, text: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """Whether a sentence of `text`, or a line of a list or of code, ends with each of them."""
        if self.blocks.is_open(text):
            line = self._tail(text).rpartition("\n")[2].strip()
            fences = self.blocks.fences
            return [i in (self.breaks if line else fences) for i in tokens]
        before = self._tail(text)
        if before.endswith("\ufffd") or _in_formula(before):  # \ufffd: a character is not whole
            return [False] * len(tokens)
        ended = ends_sentence(before)
        return [self._ends(before, ended, self._texts.get(token, ""), token) for token in tokens]

    def _ends(self, before: str, ended: bool, text: str, token: int) -> bool:
        line = before.rpartition("\n")[2]
        if token not in self._spaces:
            # A second mark ends nothing, nor does one behind a colon or where a line says nothing.
            says = bool(_SAYS.search(text)) or not (ended or _LEADS_ON.search(line))
            return says and token not in self.blocks.fences and ends_sentence(before + text)
        if "\n" not in text or ended:
            # Behind a full stop a space begins what follows.
            return bool(_SPACE.search(before + text))
        return bool(_SPACE.search(before + text)) or (is_item(line) and not _LEADS_ON.search(line))

    def begun_too_late(self, text: Sequence[int], last: bool) -> list[int]:
        """Tokens that would open a code block, and in the `last` few tokens another item of a list:
        nothing could come of them."""
        fences = [] if self.blocks.is_open(text) else list(self.blocks.fences)
        if not last:
            return fences
        *lines, here = self._tail(text).split("\n")
        begins = not here.strip() and any(map(is_item, lines))
        return [*fences, *self._marks] if begins else fences

    def _tail(self, text: Sequence[int]) -> str:
        return self._decoded(tuple(text[-_TAIL:]))
