"""The served model's tokens as text: where sentences end, which characters are cut, and what
each token adds to a length. Made at the engine's start."""

import logging
import re
from typing import Any

from torch import Tensor

from lenvm_vllm.text.characters import Characters
from lenvm_vllm.text.counter import Counter, TokenUnits
from lenvm_vllm.text.parts import Markers
from lenvm_vllm.text.sentences import Sentences
from lenvm_vllm.text.tokenizer import decoded, specials_of, texts_of
from value_server.contract.units import UNITS

logger = logging.getLogger("vllm.lenvm")

_SPACED = re.compile(r" \w")


class Letters:
    """sentences: None of a tokenizer that cannot tell them."""

    def __init__(self, tokenizer: Any, markers: Markers) -> None:
        """tokenizer: None where vLLM serves none. markers: of what is not in the client's text."""
        self._tokenizer, self._markers = tokenizer, markers
        self._texts: dict[int, str] = {}
        self._plain: TokenUnits | None = None  # of no request in particular
        self._units: dict[tuple[bool, bool], TokenUnits] = {}
        self.sentences, self.characters = None, Characters({})
        try:
            if tokenizer is not None:
                self._texts = texts_of(tokenizer)
                self.sentences = Sentences(tokenizer, self._texts)
                self.characters = Characters.of(tokenizer, self._texts)
                self._plain = self._make_plain(self.sentences)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            logger.warning(
                "length targets: cannot read the tokenizer's texts (%s): sentences, words and "
                "characters are not counted",
                why,
            )

    def ends_sentence(self, text: list[int], own: Tensor | None = None) -> bool:
        """Whether a sentence, or a line, ends where this text does. Not where its last token is not
        known yet, a -1, which no tokenizer decodes. own: as of `Sentences.is_whole`."""
        known = self.sentences if text and text[-1] != -1 else None
        return known is not None and known.is_whole(text, own)

    def counter(self, unit: str, specials: bool, calls: bool = True) -> Counter | None:
        """Of one text; None where its unit is tokens, or nothing is known of their texts.

        specials: whether special tokens are shown to the client. calls: whether tool calls are
        taken out of its text.
        """
        if unit == UNITS[0] or self._plain is None:
            return None
        return Counter(self._units_of(specials, calls and bool(self._markers.calls)), unit)

    def _units_of(self, specials: bool, calls: bool) -> TokenUnits:
        assert self._plain is not None
        if (shown := (specials, calls)) not in self._units:
            markers = self._markers
            # The parts of a longer marker may be text.
            aside = [m[0] for m in (markers.think_start, markers.think_end) if len(m) == 1]
            aside += markers.calls if calls else ()
            texts = specials_of(self._tokenizer) if specials else {}
            self._units[shown] = self._plain.but(texts | dict.fromkeys(aside, ""))
        return self._units[shown]

    def _make_plain(self, sentences: Sentences) -> TokenUnits:
        texts = self._texts
        word = next((i for i, text in texts.items() if _SPACED.match(text)), None)
        strips = word is not None and not decoded(self._tokenizer, [word]).startswith(" ")
        return TokenUnits(texts, self.characters.pieces, sentences.ids, strips)
