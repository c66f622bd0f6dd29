"""From what a person sends (messages, text or ids) to token ids, and from tokens to words."""

import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from value_server.contract.checkpoint import (
    CheckpointError,
    tokenizer_fingerprint,
    tokenizer_source,
)
from value_server.contract.units import CHARACTERS, WORDS, count, tokens_per_unit
from value_server.engine.errors import RequestError

log = logging.getLogger(__name__)

HALF = re.compile("[\ud800-\udfff]")  # of a character: JSON can tell it, no tokenizer reads it


class TextRequest(BaseModel):
    """Exactly one of `messages` (chat template), `prompt` (plain text) and `token_ids`.

    pictures: of the text, in order, for a model that sees: digests of pictures that are here, and
    data URLs; by default those in the parts "image_url" of messages. In token_ids each has all its
    placeholder tokens, elsewhere one.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    # A list is wrong at its first wrong item: errors of all would take a hundred times its memory.
    messages: list[dict[str, Any]] | None = Field(default=None, fail_fast=True)
    prompt: str | None = None
    token_ids: list[int] | None = Field(default=None, fail_fast=True)
    pictures: list[str] | None = Field(default=None, fail_fast=True)

    @property
    def given(self) -> str:
        """Name of the field that is set."""
        return self._given[0]

    @property
    def shown(self) -> list[str]:
        """What its pictures are."""
        if self.pictures is not None:
            return self.pictures
        parts = (part for message in self.messages or [] for part in _parts(message))
        return [_url(part) for part in parts if part.get("type") == "image_url"]

    @property
    def _given(self) -> list[str]:
        return [name for name, value in self if value is not None and name != "pictures"]

    @model_validator(mode="after")
    def _exactly_one(self) -> "TextRequest":
        given = self._given
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of messages, prompt and token_ids, got {given or 'none'}"
            )
        return self


class Prediction(BaseModel):
    """How long the completion behind a prompt will be.

    predicted_tokens: end-of-sequence included. The others: of its text; null where the server
    has no tokenizer.
    """

    predicted_tokens: float
    predicted_words: float | None
    predicted_characters: float | None


class Texts:
    """Turns text requests into ids. Without a tokenizer only `token_ids` can be served."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # fast tokenizers do not like two threads

    @classmethod
    def load(cls, checkpoint: Path, base_model: str, fingerprint: str) -> "Texts":
        """The checkpoint's own tokenizer if it brings one, else that of the base model (hub name
        or folder), if that has one.

        Raises CheckpointError if it is not the one that the model was trained with.
        """
        source = tokenizer_source(checkpoint, base_model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            log.warning("no tokenizer in %s, predict takes token ids only: %s", source, error)
            return cls(None)
        found = tokenizer_fingerprint(tokenizer)
        if found != fingerprint:
            raise CheckpointError(
                f"tokenizer of {source} has fingerprint {found}, "
                f"the checkpoint was trained with {fingerprint}"
            )
        return cls(tokenizer)

    def ids(self, request: TextRequest) -> list[int]:
        """Token ids, at least one. Raises RequestError naming the field."""
        name = request.given
        if request.token_ids is not None:
            ids = request.token_ids
        elif HALF.search(self._own_text(request)):
            raise RequestError(f"{name}: has half a character (a surrogate alone)", name)
        elif self._tokenizer is None:
            raise RequestError(f"{name}: this server has no tokenizer, send token_ids", name)
        elif request.messages is not None:
            ids = self._chat(request.messages)
        else:
            with self._lock:
                ids = self._tokenizer(request.prompt)["input_ids"]
        if not ids:
            raise RequestError(f"{name}: no tokens in it", name)
        return ids

    def prediction(self, request: TextRequest, tokens: float) -> Prediction:
        """The answer to this prompt in all units, if it has so many `tokens`.

        A word of it is taken to have as many as one of the prompt's own text, in whose language
        it probably is; the shorter the prompt, the more the prior counts.
        """
        words = characters = None
        if self._tokenizer is not None:
            text = self._own_text(request)
            with self._lock:
                known = len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            words, characters = (
                max(0.0, tokens - 1) / tokens_per_unit(unit, known, count(text, unit))
                for unit in (WORDS, CHARACTERS)
            )
        return Prediction(
            predicted_tokens=tokens, predicted_words=words, predicted_characters=characters
        )

    def _own_text(self, request: TextRequest) -> str:
        """A prompt's text without the chat template's; of token ids without special tokens."""
        if request.token_ids is None:
            return request.prompt or "\n".join(_said(request.messages or []))
        assert self._tokenizer is not None
        with self._lock:
            return str(self._tokenizer.decode(request.token_ids, skip_special_tokens=True))

    def _chat(self, messages: list[dict[str, Any]]) -> list[int]:
        assert self._tokenizer is not None
        plain = [_plain(message) for message in messages]
        try:
            with self._lock:
                encoded = self._tokenizer.apply_chat_template(
                    plain, add_generation_prompt=True, tokenize=True, return_dict=True
                )
        except Exception as error:  # templates are programs: they raise what they like
            raise RequestError(
                f"messages: the chat template refuses them: {error}", "messages"
            ) from error
        return list(encoded["input_ids"])


def _said(messages: list[dict[str, Any]]) -> Iterator[str]:
    """The texts of messages, those of parts as well; what is none has told the template enough."""
    for message in messages:
        parts = _parts(message) or [{"text": message.get("content")}]
        yield from (part["text"] for part in parts if isinstance(part.get("text"), str))


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that a message's content has; none where it is a text."""
    content = message.get("content")
    return [p for p in content if isinstance(p, dict)] if isinstance(content, list) else []


def _url(part: dict[str, Any]) -> str:
    """Of a picture in a message, as in OpenAI's API; what is none is refused as a picture."""
    told = part.get("image_url")
    return str(told.get("url") if isinstance(told, dict) else told)


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Pictures as all chat templates know them: without what they show."""
    parts = _parts(message)
    if not any(part.get("type") == "image_url" for part in parts):
        return message
    plain = [{"type": "image"} if part.get("type") == "image_url" else part for part in parts]
    return message | {"content": plain}
