"""Code blocks: whether a text stands in one, and the tokens that close it."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import regex

from lenvm_vllm.text.tokenizer import decoded

FENCE = regex.compile(r"^[ \t]*```", regex.MULTILINE)
_CLOSING = "\n```"
LONGEST_CLOSING = 4  # tokens


class Blocks:
    """fences: tokens with which a block may open, close, or begin to."""

    def __init__(self, tokenizer: Any, texts: dict[int, str]) -> None:
        """texts: of each token in the middle of a text."""
        self._tokenizer = tokenizer
        fences = {i for i, text in texts.items() if "``" in text}
        self.fences = frozenset(fences.union(tokenizer.encode("```", add_special_tokens=False)))
        self._ticks = frozenset(i for i, text in texts.items() if "`" in text)
        self.closing = _closing(tokenizer, texts)
        # A step asks a few times for each text. Of this object: one of the class would keep it.
        self.text_of = lru_cache(maxsize=1024)(self._decoded)

    def _decoded(self, text: tuple[int, ...]) -> str:
        return decoded(self._tokenizer, list(text))

    def may_have(self, text: Sequence[int]) -> bool:
        """Whether it may have blocks."""
        return not self.fences.isdisjoint(text)

    def is_open(self, text: Sequence[int]) -> bool:
        """Whether it stands in a block that is not closed."""
        if not self.may_have(text):
            return False
        # Behind its last backtick nothing opens or closes one. Without what stands there a long
        # text is decoded, and kept, once a backtick and not once a token.
        last = next((i for i in reversed(range(len(text))) if text[i] in self._ticks), -1)
        return len(FENCE.findall(self.text_of(tuple(text[: last + 1])))) % 2 == 1

    def closing_in(self, left: int) -> list[int]:
        """The next token of an open block of which `left` tokens may come, the last of them its
        end; empty: any."""
        fence = self.closing[1:]
        if not fence or not 1 <= left <= len(self.closing):
            return []
        return [self.closing[0] if left > len(fence) else fence[-left]]

    def rest(self, text: Sequence[int]) -> tuple[int, ...]:
        """What an open block lacks of `closing`; empty where no tokens close one."""
        begun = range(len(self.closing) - 1, 0, -1)
        done = next((n for n in begun if tuple(text[-n:]) == self.closing[:n]), 0)
        return self.closing[done:]


def _closing(tokenizer: Any, texts: dict[int, str]) -> tuple[int, ...]:
    """The end of a line and a fence; none where tokens do not make them."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    before = tokens("a")
    lines = [i for i, text in texts.items() if text == "\n"]
    fences = [[i] for i, text in texts.items() if text == "```"]
    # Some tokenizers put a space before what they begin with.
    behind = tokens("a" + _CLOSING)[len(before) + 1 :]
    for fence in (*fences, tokens("```"), behind):
        closing = (*lines[:1], *fence)
        made = decoded(tokenizer, [*before, *closing])
        if len(closing) <= LONGEST_CLOSING and lines and made.endswith("a" + _CLOSING):
            return closing
    return ()
