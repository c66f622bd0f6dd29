"""The pictures of a request, on their way to a value model that sees them.

They are loaded as vLLM loads them, before it does, and the request goes on with the very bytes in
place of their addresses: what stands behind an address may be another picture the next time, and
the value model is to see the served model's. The value servers get the files meanwhile. Their
digests ride along to the engine, which tells the servers which text has which pictures.

Whatever is in doubt is left out, and `intake` then finds fewer digests than pictures: such a text
goes without values.
"""

import asyncio
import base64
import hashlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lenvm_vllm.api.intake import proof
from lenvm_vllm.api.routes import BATCH, MESSAGES, Route
from lenvm_vllm.host import served
from lenvm_vllm.host.pictures import load, prepared_plainly
from lenvm_vllm.settings import Settings
from lenvm_vllm.target.request import MEDIA
from lenvm_vllm.telemetry.metrics import Counters
from lenvm_vllm.values.pictures import PictureServers

logger = logging.getLogger("vllm.lenvm")

# Whose headers are read here; what else vLLM may take, no value server does.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Fields by which a request has its pictures prepared in its own way.
_OWN_WAYS = ("mm_processor_kwargs", "media_io_kwargs")


@dataclass(frozen=True)
class Place:
    """Where a request has a picture. url: as vLLM reads it. holder, key: where the URL stands."""

    url: str
    holder: dict[str, Any]
    key: str


def places_of(request: dict[str, Any], path: str) -> list[Place]:
    """All pictures of a request whose bytes can be had, in the order of their text; none where it
    is not sure which vLLM takes for which."""
    messages = request.get("messages", request.get("input"))
    if path == BATCH or not isinstance(messages, list):  # of several chats it is not told which
        return []
    parts = [part for message in messages for part in _parts_of(message)]
    if any(part.get("uuid") is not None for part in parts):  # vLLM may have another under it
        return []
    if any(_holds_some(part) for part in parts):
        return []
    return [place for part in parts if (place := _place_in(part, path == MESSAGES))]


def _parts_of(message: Any) -> Iterator[dict[str, Any]]:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        yield from (part for part in content if isinstance(part, dict))


def _holds_some(part: dict[str, Any]) -> bool:
    """Whether it is a tool's result with pictures in Anthropic's form. vLLM has them before those
    of their message, and none of a system's message: as many need not be the same."""
    return any(inner.get("type") == "image" for inner in _parts_of(part))


def _place_in(part: dict[str, Any], anthropic: bool) -> Place | None:
    """A part's picture, where it has one in a form of vLLM's."""
    kind = part.get("type")
    if anthropic:
        source = part.get("source")
        if kind != "image" or not isinstance(source, dict):
            return None
        if source.get("type") == "url":
            return _place(source, "url")
        data = source.get("data")
        media_type = source.get("media_type", "image/jpeg")
        url = f"data:{media_type};base64,{data}"
        return Place(url, source, "data") if isinstance(data, str) else None
    if kind not in (None, "image_url", "input_image"):
        return None
    inner = part.get("image_url")
    return _place(inner, "url") if isinstance(inner, dict) else _place(part, "image_url")


def _place(holder: dict[str, Any], key: str) -> Place | None:
    url = holder.get(key)
    return Place(url, holder, key) if isinstance(url, str) and url else None


class Pictures:
    """One per API server process."""

    def __init__(self, settings: Settings, servers: PictureServers | None = None) -> None:
        """servers: in place of those of the settings, for tests."""
        self._settings = settings
        self._servers = servers
        self._told = False  # of files that cannot be used

    async def take(self, request: dict[str, Any], route: Route, path: str) -> None:
        """Tell the engine of a guided request's pictures, and begin to give them to the value
        servers, where these see pictures. Raises nothing."""
        places = places_of(request, path)
        servers = await self._seeing(request, places)
        if servers is None:
            return
        found = await asyncio.gather(*(self._load(place) for place in places))
        files = [file for file in found if file is not None]
        if len(files) < len(places):
            return
        servers.give(str(request.get("model")), dict(files))
        params = route.params_of(request)
        digests = [digest for digest, _ in files]
        params[route.xargs] = {**params[route.xargs], MEDIA: [proof(digests), *digests]}

    async def stand_in(self, request: dict[str, Any], path: str) -> bool:
        """Whether all pictures of a request stand in it, and a value model sees them."""
        places = places_of(request, path)
        longest = 4 * self._settings.max_picture_bytes // 3
        if any(place.url[:5] != "data:" for place in places):
            return False
        if sum(len(place.url) for place in places) > longest:  # no value server takes so much
            return False
        return await self._seeing(request, places) is not None

    async def _seeing(self, request: dict[str, Any], places: list[Place]) -> PictureServers | None:
        """The value servers, if there are pictures, and servers that see them as vLLM does."""
        if not places or len(places) > self._settings.max_pictures:
            return None
        config = served.config and served.config.model_config
        if not prepared_plainly(config) or any(request.get(name) for name in _OWN_WAYS):
            return None
        servers = self._connected()
        return servers if servers and await servers.see(str(request.get("model"))) else None

    def _connected(self) -> PictureServers | None:
        """None where a token or a certificate cannot be read here: the engine may be elsewhere."""
        if self._servers is None:  # not before it is wanted
            try:
                self._servers = PictureServers(self._settings, Counters().add)
            except (OSError, ValueError) as error:
                if not self._told:
                    logger.warning("no value server is shown pictures: %s", error)
                self._told = True
        return self._servers

    async def _load(self, place: Place) -> tuple[str, bytes] | None:
        """Digest and file; None for one that vLLM may refuse, which then says so itself."""
        config, most = served.config.model_config, self._settings.max_picture_bytes
        try:
            data = await load(place.url, config, most)
            pixels = self._settings.max_picture_pixels
            digest, url = await asyncio.to_thread(_looked_at, place.url, data, pixels)
        except Exception:
            return None
        if url is not None:
            place.holder[place.key] = url
        return digest, data


def _looked_at(url: str, data: bytes, most_pixels: int) -> tuple[str, str | None]:
    """Digest of a picture, and the URL that has its bytes where `url` has an address.

    Its pixels are counted, not read. Raises ValueError, OSError for what is no such picture.
    """
    from PIL import Image  # vLLM brings it

    with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
        width, height = picture.size
        media_type = Image.MIME.get(picture.format or "", "image/*")
    if width * height > most_pixels:
        raise ValueError(f"{width} x {height} pixels, more than {most_pixels}")
    digest = hashlib.sha256(data).hexdigest()
    if url[:5].lower() == "data:":
        return digest, None
    return digest, f"data:{media_type};base64,{base64.b64encode(data).decode()}"
