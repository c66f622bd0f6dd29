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
        self._plain: TokenUnits | None = None  # before what a request shows or sets aside
        self._units: dict[tuple[bool, bool], TokenUnits] = {}
        self.sentences, self.characters = None, Characters({})
        try:
            if tokenizer is not None:
                texts = texts_of(tokenizer)
                self.sentences = Sentences(tokenizer, texts)
                self.characters = Characters.of(tokenizer, texts)
                pieces, closing = self.characters.pieces, self.sentences.ids
                self._plain = TokenUnits(texts, pieces, closing, _strips(tokenizer, texts))
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
        calls = calls and bool(self._markers.calls)
        return Counter(self._units_of(self._plain, specials, calls), unit)

    def _units_of(self, plain: TokenUnits, specials: bool, calls: bool) -> TokenUnits:
        if (shown := (specials, calls)) not in self._units:
            markers = self._markers
            # The parts of a longer marker may be text.
            aside = [m[0] for m in (markers.think_start, markers.think_end) if len(m) == 1]
            aside += markers.calls if calls else ()
            texts = specials_of(self._tokenizer) if specials else {}
            self._units[shown] = plain.but(texts | dict.fromkeys(aside, ""))
        return self._units[shown]


def _strips(tokenizer: Any, texts: dict[int, str]) -> bool:
    """Whether a text that nothing stands before loses a space."""
    word = next((token for token, text in texts.items() if _SPACED.match(text)), None)
    return word is not None and not decoded(tokenizer, [word]).startswith(" ")
