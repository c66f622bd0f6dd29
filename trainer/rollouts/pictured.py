"""Pictures in prompts: as lines and data sets have them, and as OpenAI messages do.

A picture is a path (from the folder of the file with the prompts), a data: URL, or what a data set
of the hub holds: bytes, or a decoded picture. Nothing is fetched from the network.
"""

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.checks import check
from trainer.pictures import check_count
from trainer.rows import SHOWN
from value_server.model.pictures import MAX_BYTES, Picture, open_picture

Parts = tuple[str | Picture, ...]
Turns = tuple[tuple[str, Parts], ...]  # roles and what they say
ROLES = ("system", "user", "assistant")
RULE = "a path, a data: URL, or a picture of a data set"


def as_messages(turns: Turns) -> list[dict[str, Any]]:
    """For an OpenAI API: pictures as data: URLs, and plain text where there is nothing else."""
    return [
        {"role": role, "content": parts[0] if _is_text(parts) else [as_part(p) for p in parts]}
        for role, parts in turns
    ]


def _is_text(parts: Parts) -> bool:
    return len(parts) == 1 and isinstance(parts[0], str)


def as_part(part: str | Picture) -> dict[str, Any]:
    """Of a message's content."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = Image.open(io.BytesIO(part.data)).get_format_mimetype() or "image/png"
    url = f"data:{kind};base64,{base64.b64encode(part.data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def turns_of(place: str, messages: Any, folder: Path) -> Turns:
    """Of OpenAI messages. Raises ValueError naming the place and what is wrong with them."""
    fits = isinstance(messages, Sequence) and bool(messages) and not isinstance(messages, str)
    check(fits, f"{place}: messages", _short(messages), "a list of messages")
    turns = []
    for number, message in enumerate(messages):
        name = f"{place}: messages[{number}]"
        check(isinstance(message, Mapping), name, _short(message), "an object")
        role, content = message.get("role"), message.get("content")
        check(role in ROLES, f"{name}: role", role, "one of " + ", ".join(ROLES))
        said = [{"type": "text", "text": content}] if isinstance(content, str) else content
        check(bool(said) and isinstance(said, Sequence), f"{name}: content", _short(content),
              "a text, or a list of parts")  # fmt: skip
        parts = (_part_of(f"{name}: content[{n}]", p, folder) for n, p in enumerate(said))
        turns.append((str(role), tuple(parts)))
    check(turns[-1][0] == "user", f"{place}: messages: the last role", turns[-1][0], "user")
    check_count(place, len(pictures_of(tuple(turns))))
    return tuple(turns)


def _part_of(name: str, part: Any, folder: Path) -> str | Picture:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    url = part.get("image_url") if kind == "image_url" else None
    url = url.get("url") if isinstance(url, Mapping) else url
    check(isinstance(url, str), name, _short(part), "of type text or image_url, with what it names")
    return picture_of(f"{name}: image_url", url, folder)


def pictures_of(turns: Turns) -> tuple[Picture, ...]:
    """All of them, in order."""
    return tuple(part for _, parts in turns for part in parts if isinstance(part, Picture))


def pictures_in(place: str, column: str, value: Any, folder: Path) -> tuple[Picture, ...]:
    """Of a row's column: one, several or none. Raises ValueError naming place and column."""
    if value is None:
        return ()
    several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    values = value if several else [value]
    check_count(place, len(values))
    name = f"{place}: {column}"
    return tuple(
        picture_of(f"{name}[{n}]" if several else name, one, folder) for n, one in enumerate(values)
    )


def picture_of(name: str, value: Any, folder: Path) -> Picture:
    """One that can be opened. Raises ValueError with `name` in it."""
    picture = Picture.of(_bytes_of(name, value, folder))
    open_picture(picture.data, name)
    return picture


def _bytes_of(name: str, value: Any, folder: Path) -> bytes:
    if isinstance(value, Mapping):  # of a data set, not decoded
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        out = io.BytesIO()
        value.save(out, "PNG")
        return out.getvalue()
    if isinstance(value, bytes):
        return value
    check(isinstance(value, str), name, _short(value), RULE)
    if value.startswith("data:"):
        head, _, body = value.partition(",")
        check(head.endswith(";base64"), name, _short(value), "in base64 where it is a data: URL")
        try:
            return base64.b64decode(body, validate=True)
        except binascii.Error as error:
            raise ValueError(f"{name}: {_short(value)!r}: {error}") from error
    path = folder / value
    check("://" not in value, name, _short(value), f"{RULE}; nothing is fetched")
    check(path.is_file(), name, _short(value), f"{RULE}; there is no file {path}")
    size = path.stat().st_size
    check(size <= MAX_BYTES, name, size, f"at most {MAX_BYTES} bytes")
    return path.read_bytes()


def _short(value: Any) -> str:
    return value[:SHOWN] if isinstance(value, str) else repr(value)[:SHOWN]
