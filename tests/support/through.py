"""Requests through the middleware, and a vLLM behind it that keeps what reaches it."""

import asyncio
import json
from typing import Any

from lenvm_vllm.api.middleware import LengthTargetMiddleware
from lenvm_vllm.api.routes import CHAT
from lenvm_vllm.telemetry.progress import KEY


def chunk(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def send_through(
    app: Any, *messages: Any, path: str = CHAT, method: str = "POST", **scope: Any
) -> tuple[int, dict[bytes, bytes], bytes]:
    """(status, headers, body) of the answer that `app`, an ASGI application, gives to a client
    who sends these messages and leaves."""
    sent: list[Any] = []
    waiting = [*messages, {"type": "http.disconnect"}]
    scope = {"type": "http", "method": method, "path": path, "headers": []} | scope

    async def receive() -> Any:
        return waiting.pop(0) if len(waiting) > 1 else waiting[0]

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start, *parts = sent
    return start["status"], dict(start["headers"]), b"".join(m.get("body", b"") for m in parts)


def post_to(app: Any, request: Any, path: str = CHAT) -> tuple[int, dict[bytes, bytes], Any]:
    """(status, headers, JSON) of an answer of `app` behind the middleware."""
    message = chunk(json.dumps(request).encode())
    status, headers, body = send_through(LengthTargetMiddleware(app), message, path=path)
    return status, headers, json.loads(body)


class Keeper:
    """Keeps the scope and the body that reach it, and how the client left."""

    def __init__(self) -> None:
        self.scope: dict[str, Any] | None = None
        self.body = b""
        self.disconnected = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = scope
        while True:
            message = await receive()
            self.disconnected = message["type"] == "http.disconnect"
            self.body += message.get("body", b"")
            if self.disconnected or not message.get("more_body", False):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    @property
    def asked(self) -> Any:
        """Without what the answer's own account of its length needs."""
        request = json.loads(self.body)
        request["vllm_xargs"].pop(KEY, None)
        request.pop("return_token_ids", None)
        return request

    @property
    def headers(self) -> dict[bytes, bytes]:
        assert self.scope is not None
        return dict(self.scope["headers"])


def call(*messages: Any, **scope: Any) -> Any:
    """(keeper, status, JSON of the answer or None) of one request through the middleware."""
    keeper = Keeper()
    length = str(sum(len(m.get("body", b"")) for m in messages)).encode()
    headers = [(b"content-type", b"application/json"), (b"Content-Length", length)]
    middleware = LengthTargetMiddleware(keeper)
    status, _, body = send_through(middleware, *messages, **{"headers": headers, **scope})
    return keeper, status, json.loads(body) if body else None


def post(body: Any, **scope: Any) -> Any:
    return call(chunk(json.dumps(body).encode()), **scope)
