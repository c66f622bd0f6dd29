"""Requests with pictures, as clients write them."""

import base64
import io
from collections.abc import Awaitable
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from vllm.connections import global_http_connection

T = TypeVar("T")


def png(seed: int = 0, width: int = 30, height: int = 20, form: str = "PNG") -> bytes:
    """A file of coloured noise, also in another format."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, form)
    return out.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def said(*parts: Any) -> dict[str, Any]:
    """A message of a user; a part that is a string is text."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return {"role": "user", "content": content}


async def with_vllms_client(work: Awaitable[T]) -> T:
    """vLLM's client of media lives as long as its server's event loop: here, as long as `work`."""
    try:
        return await work
    finally:
        if client := global_http_connection._async_client:
            await client.close()
        global_http_connection._async_client = None
