"""The few moves of ASGI that the middleware is made of."""

import json
from typing import Any


async def read(receive: Any) -> list[Any]:
    """The messages of one request, up to its last or to a disconnect."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False):
        messages.append(await receive())
    return messages


def replay(messages: list[Any], receive: Any) -> Any:
    """An ASGI `receive` that gives `messages` first."""
    waiting = iter(messages)

    async def replayed() -> Any:
        for message in waiting:
            return message
        return await receive()

    return replayed


def request_of(body: bytes) -> dict[str, Any]:
    """The one message of a request."""
    return {"type": "http.request", "body": body, "more_body": False}


def resized(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    """The same headers of a body of another length."""
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*kept, (b"content-length", b"%d" % length)]


async def ask(app: Any, scope: Any, request: Any, receive: Any) -> tuple[Any, bytes, Any]:
    """Start, body and parsed answer of `app` to a JSON request.

    The last is None for an error, and where vLLM gave up since the client is gone.
    """
    body = json.dumps(request).encode()
    start: Any = {}
    parts: list[bytes] = []

    async def keep(message: Any) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            parts.append(message.get("body", b""))

    scope = {**scope, "headers": resized(scope["headers"], len(body))}
    await app(scope, replay([request_of(body)], receive), keep)
    whole = b"".join(parts)
    return start, whole, json.loads(whole) if start["status"] == 200 else None


async def respond(send: Any, start: Any, body: bytes, *headers: tuple[str, int]) -> None:
    """An answer begun by `start`, with another body and some headers more."""
    more = [(name.encode(), b"%d" % value) for name, value in headers]
    await send({**start, "headers": [*resized(start["headers"], len(body)), *more]})
    await send({"type": "http.response.body", "body": body})


def compact(answer: Any) -> bytes:
    """JSON as vLLM writes it."""
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
