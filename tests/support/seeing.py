"""Value models that see: tiny ones of each family, and what plain transformers makes of a text."""

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tests.support import tiny
from tests.support.blocked import SECONDS
from tests.support.tiny_vision import (
    MORE,
    SIZES,
    picture,
    png,
    text_with,
    whole_hidden,
    write_backbone,
)
from value_server.contract.checkpoint import LenvmConfig, tokenizer_fingerprint
from value_server.engine.engine import Engine
from value_server.model.sight import Sight
from value_server.model.value_model import ValueHead, ValueModel

TILES = ("smolvlm", "idefics3")  # families whose pictures have tokens between their rows


@dataclass
class Seer:
    """A model of a family twice: as a value model, and whole, by plain transformers."""

    name: str
    whole: Any
    value: ValueModel

    @classmethod
    def of(cls, name: str, folder: Path, lookahead: int = 0) -> "Seer":
        whole = write_backbone(folder, name)
        parts = [type(whole).from_pretrained(folder).eval() for _ in range(2)]
        other = tiny.tiny_lookahead(lookahead) if lookahead else tiny.tiny_model(more=MORE)
        facts = {"base_model": str(folder), "num_layers": 3, "pictures": True}
        lenvm = msgspec.structs.replace(other.lenvm, **facts)
        sight = Sight(parts[0], str(folder))
        value = ValueModel(parts[1].get_decoder(), other.head, lenvm, sight).eval()
        value.lookahead = other.lookahead
        return cls(name, whole, value)

    def pixels(self, number: int) -> Any:
        assert self.value.sight
        return self.value.sight.pixels(picture(number, *SIZES[number % len(SIZES)]))

    def rows(self, number: int) -> int:
        """Of a picture, as many as it has placeholders."""
        assert self.value.sight
        return len(self.value.sight.look(self.pixels(number)).rows)

    def text(self, numbers: list[int]) -> list[int]:
        """A text with these pictures."""
        return text_with([self.rows(n) for n in numbers], 1 if self.name in TILES else None)

    def show(self, engine: Engine, numbers: list[int]) -> None:
        assert engine.showing
        for number in numbers:
            engine.showing.look(digest(number), self.pixels(number))

    @torch.inference_mode()
    def plain(self, text: list[int], numbers: list[int]) -> torch.Tensor:
        """(T, H) hidden states by plain transformers, everything at once."""
        return whole_hidden(self.whole, text, [self.pixels(number) for number in numbers])

    @torch.inference_mode()
    def z(self, text: list[int], numbers: list[int]) -> float:
        """The logit at the end of the text."""
        device = self.value.backbone.device
        return float(self.value.head(self.plain(text, numbers)[-1].to(device)))


class ShutSight:
    """The sight of a model, which sees when a test lets it. looks: that have begun."""

    def __init__(self, seer: Seer) -> None:
        sight = seer.value.sight
        assert sight
        self.looks = 0
        self._began, self._open, self._look = threading.Semaphore(0), threading.Event(), sight.look
        sight.look = self.look  # type: ignore[method-assign]

    def look(self, pixels: Any) -> Any:
        self.looks += 1
        self._began.release()
        assert self._open.wait(SECONDS)
        return self._look(pixels)

    def wait_for_look(self) -> None:
        """Return when one begins; each is reported once."""
        assert self._began.acquire(timeout=SECONDS)

    def open(self) -> None:
        """For all looks from now on."""
        self._open.set()


def value_checkpoint(folder: Path, base: Path, sees: bool) -> Path:
    """Of the text part of `base`, as `lenvm serve` takes it, with a random head; returns `folder`.

    sees: with tower and projector of `base`; else it reads text alone.
    """
    torch.manual_seed(1)
    whole, other = (AutoModelForImageTextToText.from_pretrained(base).float() for _ in range(2))
    tokenizer, decoder = AutoTokenizer.from_pretrained(base), other.model.get_decoder()
    lenvm = LenvmConfig(
        gamma=tiny.GAMMA,
        base_model=str(base),
        weights="full",
        num_layers=decoder.config.num_hidden_layers,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        pictures=sees,
    )
    sight = Sight(whole.model, str(base)) if sees else None
    ValueModel(decoder, ValueHead(decoder.config.hidden_size), lenvm, sight).save(folder)
    tokenizer.save_pretrained(folder)
    return folder


def file_of(number: int) -> bytes:
    """The same picture as `Seer.pixels`."""
    return png(number, *SIZES[number % len(SIZES)])


def digest(number: int) -> str:
    return hashlib.sha256(file_of(number)).hexdigest()


def digests(numbers: list[int]) -> list[str]:
    return [digest(number) for number in numbers]
