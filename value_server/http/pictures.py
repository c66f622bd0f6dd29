"""Pictures that clients send: bytes, pixels, and what the model makes of them.

    body ──▶ the looker decodes it, and the model looks at it ──▶ the store

What a picture shows is nowhere logged.
"""

import asyncio
import base64
import binascii
import hashlib
import re
from collections.abc import Sequence

from starlette.concurrency import run_in_threadpool

from value_server.engine.batcher import Batcher
from value_server.engine.errors import BlindModelError, BusyError, RequestError
from value_server.engine.pictures import MOST_PIXELS
from value_server.engine.showing import Showing

DIGEST = re.compile("[0-9a-f]{64}")
# Families in whose prompts nothing but its placeholders is told of a picture by its size.
PLAIN = ("llava", "qwen2_5_vl", "qwen3_vl")
MOST_WAITING = 64
MOST_GIVEN = 64  # of one text request


class Intake:
    """Of one model. most_pixels: of a picture, checked before it is decoded."""

    def __init__(self, batcher: Batcher, most_pixels: int = MOST_PIXELS) -> None:
        self._looker, self._showing = batcher.looker, batcher.engine.showing
        self._most_pixels = most_pixels
        self._coming: dict[str, asyncio.Future[None]] = {}

    def has(self, digest: str) -> bool:
        """Whether the picture is here. Raises BlindModelError."""
        return self._sees().store.has(digest)

    async def take(self, digest: str, body: bytes) -> None:
        """Hold the picture; at once, if it is here. One that comes twice at a time is looked at
        once. Raises RequestError. To cancel it drops a picture whose turn has not come."""
        store = self._sees().store
        while coming := self._coming.get(digest):
            await asyncio.wait([coming])
        if store.has(digest):
            return
        if problem := store.problem(digest):
            raise RequestError(problem, "body")
        if len(self._coming) >= MOST_WAITING:
            raise BusyError(f"{MOST_WAITING} pictures wait already")
        assert self._looker is not None
        look = self._looker.look(digest, body, self._most_pixels)
        self._coming[digest] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wrap_future(look)
        finally:
            self._coming.pop(digest).set_result(None)

    async def take_all(self, given: Sequence[str]) -> list[str]:
        """Digests of what a text request calls its pictures: digests, and data URLs of files.

        Raises RequestError.
        """
        if len(given) > MOST_GIVEN:
            raise RequestError(f"pictures: {len(given)}, at most {MOST_GIVEN}", "pictures")
        found = []
        for number, name in enumerate(given):
            if not DIGEST.fullmatch(name):
                name, body = await run_in_threadpool(_decoded, name, f"pictures.{number}")
                await self.take(name, body)
            found.append(name)
        return found

    def widened(self, ids: list[int], digests: Sequence[str], field: str) -> list[int]:
        """The ids with a placeholder for each row of each picture. Raises RequestError."""
        sight, store = self._sees().sight, self._sees().store
        family, count = sight.tower.config.model_type, ids.count(sight.placeholder)
        if family not in PLAIN:
            what = f"its own tokens stand around a picture of {family}"
            raise RequestError(f"{field}: {what}, send token_ids", field)
        if count != len(digests):
            what = f"{count} placeholders in it for {len(digests)} pictures"
            raise RequestError(f"{field}: {what}", field)
        known = [store.find(digest) for digest in digests]
        sizes = iter([picture.size if picture else 0 for picture in known])
        is_picture = sight.placeholder.__eq__
        return [i for id_ in ids for i in ([id_] * next(sizes) if is_picture(id_) else [id_])]

    def _sees(self) -> Showing:
        if self._showing is None:
            raise BlindModelError("the value model reads text alone: it sees no pictures")
        return self._showing


def _decoded(url: str, field: str) -> tuple[str, bytes]:
    """Digest and bytes of the file in a data URL. Raises RequestError."""
    head, comma, data = url.partition(",")
    try:
        if not (comma and head.startswith("data:") and head.endswith(";base64")):
            raise ValueError("something else")
        body = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        what = "neither a sha256 in lower-case hex nor a data URL in base64"
        raise RequestError(f"{field}: {head[:64]!r}, {what}", field) from error
    return hashlib.sha256(body).hexdigest(), body
