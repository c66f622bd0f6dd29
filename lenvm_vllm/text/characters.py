"""Characters of several tokens, so that none is cut: which tokens leave one unfinished.

In tokenizers that work on bytes a letter of some scripts, or an emoji, is two to four tokens.
"""

import re
from collections.abc import Sequence
from typing import Any

LONGEST = 4  # bytes of a character
_BYTE = re.compile("<0x([0-9A-F]{2})>")


class Characters:
    """Of the tokens that are not whole characters: there are some hundred in a vocabulary."""

    def __init__(self, pieces: dict[int, bytes]) -> None:
        """pieces: the bytes of each such token."""
        self.pieces = pieces

    @classmethod
    def of(cls, tokenizer: Any, texts: dict[int, str]) -> "Characters":
        """texts: of each token in the middle of a text."""
        broken = [i for i, text in texts.items() if "\ufffd" in text]
        names = zip(
            broken, tokenizer.convert_ids_to_tokens(broken, skip_special_tokens=True), strict=True
        )
        bytes_of = {i: _bytes_of(name) for i, name in names}
        return cls({i: piece for i, piece in bytes_of.items() if piece is not None})

    def missing(self, text: Sequence[int]) -> int:
        """Bytes that the last character of a text lacks."""
        end = b""
        for token in reversed(text[-LONGEST:]):
            if (piece := self.pieces.get(token)) is None:
                break
            end = piece + end
        return _missing(end)

    def unfinished(self, text: Sequence[int], room: int) -> list[int]:
        """Tokens behind which the text would lack more than `room` bytes."""
        before = text[-LONGEST:]
        return [i for i in self.pieces if self.missing([*before, i]) > room]

    def continuing(self, text: Sequence[int], room: int) -> list[int]:
        """Tokens that go on with the text's last character, and leave no more than `room`."""
        before = text[-LONGEST:]
        return [
            i
            for i, piece in self.pieces.items()
            if _continues(piece[0]) and self.missing([*before, i]) <= room
        ]


def _continues(byte: int) -> bool:
    return 0x80 <= byte < 0xC0


def _missing(end: bytes) -> int:
    """Bytes that the last character of some UTF-8 lacks; 0 of what is none."""
    for have in range(1, min(len(end), LONGEST - 1) + 1):
        byte = end[-have]
        if not _continues(byte):
            length = 2 if 0xC2 <= byte < 0xE0 else 3 if 0xE0 <= byte < 0xF0 else 4
            return max(0, length - have) if 0xC2 <= byte < 0xF5 else 0
    return 0


def _alphabet() -> dict[str, int]:
    """The letters by which byte-level tokenizers call bytes: GPT-2's."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    named = {chr(byte): byte for byte in plain}
    return named | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_LETTERS = _alphabet()


def _bytes_of(name: str | bytes) -> bytes | None:
    """The bytes of a token by its name in the vocabulary; None where that does not tell."""
    if isinstance(name, bytes):
        return name
    if match := _BYTE.fullmatch(name):
        return bytes([int(match[1], 16)])
    if name and all(letter in _LETTERS for letter in name):
        return bytes(_LETTERS[letter] for letter in name)
    return None
