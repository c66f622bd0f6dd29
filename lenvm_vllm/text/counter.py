"""Words and characters of a text that comes token by token, and what each next token would add.

Exact on the text that the client gets: a token adds what it adds to the decoded text, a special
token nothing, and of a character of several tokens the first one counts. While a character is not
whole only what goes on with it may come, so that a text is always valid UTF-8.
"""

import codecs
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import regex
import torch
from torch import Tensor

from lenvm_vllm.steering.constants import LAST_WORD, LAST_WORD_PART, TELLING
from lenvm_vllm.text.sentences import ends_sentence
from value_server.contract.units import (
    CHARACTERS,
    IDEOGRAPH,
    IN,
    MARKS,
    OUT,
    WORDS,
    follow_words,
    tokens_per_unit,
)

_FORBIDDEN = 2**15 - 1  # what a token adds that must not come
_PLACES = (OUT, IN, IDEOGRAPH, MARKS)
_IN_WORD = regex.compile(r"[\p{L}\p{N}\p{M}'\u2019_-]")  # within a word
_FEW = 0.05  # of a vocabulary
_LOST = "\ufffd"  # stands for bytes that are no character
_IDEOGRAPH, _LETTER = "\u4e00", "a"


@dataclass(frozen=True, eq=False)
class Closed:
    """Tokens that must not come.

    mask: (V,) bool. few, few_ids: (M,) ids of them, where they are few, as far from any limit.
    """

    mask: Tensor
    few: Tensor | None = None
    few_ids: frozenset[int] = frozenset()

    @classmethod
    def of(cls, mask: Tensor) -> "Closed":
        if mask.float().mean() > _FEW:
            return cls(mask)
        few = mask.nonzero()[:, 0]
        return cls(mask, few, frozenset(few.tolist()))


class TokenUnits:
    """What the tokens of a vocabulary add to a text."""

    def __init__(
        self,
        texts: dict[int, str],
        pieces: dict[int, bytes],
        closing: Iterable[int] = (),
        strips: bool = False,
    ) -> None:
        """texts: of each token in the middle of a text, "" of one that is not shown.
        pieces: bytes of tokens that are not whole characters. closing: tokens with which a
        sentence may end. strips: whether a text that nothing stands before loses a space."""
        self.texts = texts
        self.strips = strips
        self.pieces = pieces
        self._closing = frozenset(closing)
        size = max(texts, default=-1) + 1
        self._characters = np.full(size, _FORBIDDEN, np.int16)
        self._words = np.full((len(_PLACES), size), _FORBIDDEN, np.int16)
        self._goes_on = np.zeros(size, bool)  # with the word that the text ends with
        self._closes = np.zeros(size, bool)  # the sentence that the text ends with
        self._know(texts)
        for token, piece in pieces.items():
            self._goes_on[token] = bool(_IN_WORD.match(_text_of(piece)[0] or _stand_in(piece)))

    def but(self, texts: dict[int, str]) -> "TokenUnits":
        """The same with other texts of some tokens: those of a whole vocabulary take seconds."""
        changed = copy(self)
        changed.texts = self.texts | texts
        new = max(changed.texts, default=-1) + 1 - len(self._characters)
        changed._characters = np.pad(self._characters, (0, new), constant_values=_FORBIDDEN)
        changed._words = np.pad(self._words, ((0, 0), (0, new)), constant_values=_FORBIDDEN)
        changed._goes_on, changed._closes = (
            np.pad(own, (0, new)) for own in (self._goes_on, self._closes)
        )
        changed._know(texts)
        return changed

    def _know(self, texts: dict[int, str]) -> None:
        for token, text in texts.items():
            if token in self.pieces or _LOST in text:
                continue
            self._characters[token] = min(len(text), _FORBIDDEN)
            self._words[:, token] = [
                min(follow_words(text, place)[0], _FORBIDDEN) for place in _PLACES
            ]
            self._goes_on[token] = bool(_IN_WORD.match(text))
            closes = token in self._closing and text == text.rstrip()
            self._closes[token] = closes and ends_sentence(f"word{text}")

    # They are cached as long as the object, which is as long as the process.

    @lru_cache(maxsize=512)  # noqa: B019
    def closed(self, unit: str, place: int, pending: bytes, room: int, on: Any) -> "Closed":
        """Tokens that must not come where `room` is left, `most` at most.

        place: as of `follow_words`. pending: bytes of a character that is not whole. on: a device.
        """
        return Closed.of(torch.from_numpy(self._added(unit, place, pending) > room).to(on))

    @lru_cache(maxsize=64)  # noqa: B019
    def most(self, unit: str, place: int, pending: bytes) -> int:
        """The most that a token adds; with more room than that all rows are alike."""
        added = self._added(unit, place, pending)
        return int(added[added < _FORBIDDEN].max(initial=0))

    @lru_cache(maxsize=8)  # noqa: B019
    def last_word(self, on: Any) -> tuple[Tensor, Tensor]:
        """(V,) bool each: tokens that go on with a text's word, and that close its sentence."""
        return torch.from_numpy(self._goes_on).to(on), torch.from_numpy(self._closes).to(on)

    @lru_cache(maxsize=64)  # noqa: B019
    def _added(self, unit: str, place: int, pending: bytes) -> Any:
        """(V,) what each token adds to the amount of a text."""
        if pending:
            added = np.full_like(self._characters, _FORBIDDEN)
        else:
            added = (self._characters if unit == CHARACTERS else self._words[place]).copy()
        counted = _most_of(pending, unit, place)
        for token, piece in self.pieces.items():
            text, rest = _text_of(pending + piece)
            if text is not None and self._can_end(rest):
                text += _stand_in(rest)
                more = len(text) if unit == CHARACTERS else follow_words(text, place)[0]
                added[token] = more - counted
        return added

    @cache  # noqa: B019
    def _can_end(self, pending: bytes) -> bool:
        """Whether tokens can make a character of this: not all vocabularies have all bytes."""
        behind = (_text_of(pending + piece) for piece in self.pieces.values())
        return not pending or any(
            text is not None and (not rest or (not text and self._can_end(rest)))
            for text, rest in behind
        )


class Counter:
    """Follows one text.

    units: of its vocabulary. tokens: so far. over: whether the text has ended.
    """

    def __init__(self, units: TokenUnits, unit: str) -> None:
        """unit: words or characters."""
        self.units = units
        self._unit = unit
        self._strips = False
        self.restart([])

    def restart(self, prompt: Sequence[int]) -> None:
        """A new text behind this prompt, whose end tells how many tokens a unit may take."""
        self._begin()
        for token in prompt[-TELLING:]:
            self.follow(token)
        self._prompt = self.tokens, self._whole
        self._begin()
        texts = self.units.texts
        self._strips = self.units.strips and not any(texts.get(token) for token in prompt)

    def _begin(self) -> None:
        self.tokens = self._whole = 0
        self.over = False
        self._place = OUT
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> bytes:
        """Bytes of a character that is not whole."""
        return self._decoder.getstate()[0]

    @property
    def amount(self) -> int:
        """Of the text so far; a character that is not whole counts as the most it may become."""
        return self._whole + _most_of(self.pending, self._unit, self._place)

    @property
    def ratio(self) -> float:
        """Tokens that a unit takes in this text, as far as it and its prompt tell."""
        tokens, amount = self._prompt
        return tokens_per_unit(self._unit, self.tokens + tokens, self._whole + amount)

    def follow(self, token: int) -> None:
        """The text goes on with this token."""
        text = self.units.texts.get(token, "")
        if (piece := self.units.pieces.get(token)) is not None:
            text = self._decoder.decode(piece)
        elif text and self.pending:
            text = self._decoder.decode(b"", final=True) + text
        if self._strips and text:
            text, self._strips = text.removeprefix(" "), False
        self.tokens += bool(text)
        words, self._place = follow_words(text, self._place)
        self._whole += len(text) if self._unit == CHARACTERS else words

    def amount_of(self, tokens: Iterable[int]) -> int:
        """What a line with these tokens alone would have."""
        text = "".join(self.units.texts.get(token, "") for token in tokens)
        return len(text) if self._unit == CHARACTERS else follow_words(text, OUT)[0]

    def part(self) -> None:
        """A text of its own begins: no word goes on in it."""
        self._place = OUT

    @property
    def saved(self) -> tuple[Any, ...]:
        """What `restore` takes, to take back what is followed from here on."""
        return self.tokens, self._whole, self._place, self._strips, self._decoder.getstate()

    def restore(self, saved: tuple[Any, ...]) -> None:
        self.tokens, self._whole, self._place, self._strips, decoder = saved
        self._decoder.setstate(decoder)

    def is_full(self, room: int | None) -> bool:
        """Whether nothing may come but the end, with so much room; None: any."""
        if room is None or room > 0 or self.pending:
            return False
        return self._unit == CHARACTERS or self._place == OUT

    def has_last_word(self, room: int) -> bool:
        """Whether no other word may begin, as there is no room for it."""
        if self.pending:
            return False
        fits = self._unit == WORDS or self._place == IDEOGRAPH
        return room <= (0 if fits else min(LAST_WORD, (self.amount + room) // LAST_WORD_PART))

    def closed(self, room: int | None, on: Any) -> "Closed":
        """Tokens that must not come next where `room` is left, None: any. on: a device."""
        here = self._unit, self._place, self.pending
        most = self.units.most(*here)
        return self.units.closed(*here, most if room is None else min(room, most), on)


def _most_of(pending: bytes, unit: str, place: int) -> int:
    """The most that a character which is not whole adds to a text at `place`."""
    text = _stand_in(pending)
    return len(text) if unit == CHARACTERS else follow_words(text, place)[0]


def _stand_in(pending: bytes) -> str:
    """A character that adds as much as any that begins with these bytes; "" for none."""
    if not pending:
        return ""
    first = pending[0]
    # What is in these ranges of Unicode is no ideograph.
    other = first < 0xE2 or 0xEA <= first <= 0xEE or pending[:2] == b"\xf0\x9f"
    return _LETTER if other else _IDEOGRAPH


def _text_of(data: bytes) -> tuple[str | None, bytes]:
    """The whole characters of some UTF-8 and the bytes behind them; None of what is none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError:
        return None, b""
    return None if _LOST in text else text, decoder.getstate()[0]
