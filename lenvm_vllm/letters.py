"""The served model's tokens as text: where sentences end, which characters are cut, and what
each token adds to a length. Made once, at the engine's start."""

import logging
import re
from functools import cached_property
from typing import Any

from lenvm_vllm.characters import Characters
from lenvm_vllm.parts import Markers
from lenvm_vllm.sentences import Sentences
from lenvm_vllm.tokenizer import decoded, specials_of, texts_of
from lenvm_vllm.units import Counter, TokenUnits
from value_server.contract.units import UNITS

logger = logging.getLogger("vllm.lenvm")

_SPACED = re.compile(r" \w")


class Letters:
    """sentences: None of a tokenizer that cannot tell them."""

    def __init__(self, tokenizer: Any, markers: Markers) -> None:
        """tokenizer: None where vLLM serves none. markers: of what is not in the client's text."""
        self._tokenizer, self._markers = tokenizer, markers
        self._texts: dict[int, str] = {}
        self.sentences, self.characters = None, Characters({})
        self._without_specials: TokenUnits | None = None
        try:
            if tokenizer is not None:
                self._texts = texts_of(tokenizer)
                self.sentences = Sentences(tokenizer, self._texts)
                self.characters = Characters.of(tokenizer, self._texts)
                self._without_specials = self._units({})
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            logger.warning("length targets: no ends of sentences, words or characters (%s)", why)

    def ends_sentence(self, text: list[int]) -> bool:
        """Whether a sentence ends where this text does."""
        known = self.sentences
        return bool(text) and known is not None and known.ends(text[:-1], text[-1])

    def counter(self, unit: str, specials: bool) -> Counter | None:
        """Of one text; None where its unit is tokens, or nothing is known of their texts.

        specials: whether special tokens are shown to the client.
        """
        if unit == UNITS[0] or self._without_specials is None:
            return None
        return Counter(self._with_specials if specials else self._without_specials, unit)

    @cached_property
    def _with_specials(self) -> TokenUnits:
        return self._units(specials_of(self._tokenizer))

    def _units(self, specials: dict[int, str]) -> TokenUnits:
        assert self.sentences is not None
        markers = self._markers
        # Those of several tokens have tokens that are words elsewhere.
        alone = (m[0] for m in (markers.think_start, markers.think_end) if len(m) == 1)
        aside = {*alone, *markers.calls}
        texts = self._texts | specials | dict.fromkeys(aside, "")
        word = next((i for i, text in texts.items() if _SPACED.match(text)), None)
        strips = word is not None and not decoded(self._tokenizer, [word]).startswith(" ")
        return TokenUnits(texts, self.characters.pieces, self.sentences.ids, strips)
