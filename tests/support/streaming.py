"""A fake vLLM that streams its first answer, and what its client had when it was asked again."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from lenvm_vllm.api.middleware import LengthTargetMiddleware
from lenvm_vllm.api.routes import CHAT
from lenvm_vllm.telemetry.progress import KEY
from tests.support.engine_side import EVENTS, App, Told, tell
from tests.support.through import chunk

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class Streaming(App):
    """Its first answer is a stream, the others are as of `App`.

    size: bytes of a message. more: events in front of the one with that number.
    """

    def __init__(
        self,
        told: Told,
        *rounds: Sequence[Told],
        size: int = 0,
        more: dict[int, bytes] | None = None,
    ) -> None:
        super().__init__([told], *rounds)
        self.size, self.more = size, more or {}
        self.sent: list[bytes] = []  # to the client
        self.before: list[bytes] = []  # of that, when each round was asked for

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.asked:
            self.before.append(b"".join(self.sent))
            await super().__call__(scope, receive, send)
            return
        request = json.loads((await receive())["body"])
        self.asked.append((scope["path"], request))
        (told,) = self.rounds[0]
        await send({"type": "http.response.start", "status": 200, "headers": [EVENTS]})
        for number, event in enumerate(events_of(scope["path"], request, told)):
            tell(self.engine, request["vllm_xargs"][KEY], told)
            await self._say(send, self.more.get(number, b"") + event)
        await send({"type": "http.response.body", "body": b""})

    async def _say(self, send: Any, body: bytes) -> None:
        size = self.size or len(body)
        for at in range(0, len(body), size):
            message = {"type": "http.response.body", "body": body[at : at + size]}
            await send(message | {"more_body": True})

    def answer(self, request: Any, path: str = CHAT) -> "Heard":
        """What the client gets through the middleware."""

        async def receive() -> Any:
            return asked.pop() if asked else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            self.sent.append(message.get("body", b""))

        asked = [chunk(json.dumps(request | {"stream": True}).encode())]
        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        asyncio.run(LengthTargetMiddleware(self)(scope, receive, send))
        return Heard(b"".join(self.sent))


class Heard:
    """The chunks of a stream."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        events = [event for event in body.split(b"\n\n") if event.startswith(b"data: {")]
        self.chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
        self.choices = [choice for chunk in self.chunks for choice in chunk.get("choices", ())]

    @property
    def text(self) -> str:
        return "".join(c.get("delta", c).get("content", c.get("text")) or "" for c in self.choices)

    @property
    def ids(self) -> list[int]:
        return [i for choice in self.choices for i in choice.get("token_ids") or ()]

    @property
    def result(self) -> Any:
        return self.choices[-1]["length_result"]


def events_of(path: str, request: Any, told: Told) -> list[bytes]:
    """As vLLM writes them: a token each, the usage if that is wanted, and the end."""
    options = request.get("stream_options") or {}
    letters = [*told.text, ""]
    chunks = [_chunk(path, [], "", None)] if path == CHAT else []
    for number, token in enumerate(told.ids):
        last = number == len(told.ids) - 1
        chunks.append(_chunk(path, [token], letters[number], told.finish if last else None))
        if options.get("continuous_usage_stats"):
            chunks[-1]["usage"] = usage_of(number + 1)
    chunks[-1]["choices"][0]["stop_reason"] = told.stop_reason
    asked = chunks[0] if path == CHAT else chunks[0]["choices"][0]
    asked["prompt_token_ids"] = [65, 66]
    if options.get("include_usage"):
        chunks.append({"id": "r", "choices": [], "usage": usage_of(told.length)})
    return [*(f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks), DONE]


def usage_of(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 2, "completion_tokens": tokens, "total_tokens": tokens + 2}


def _chunk(path: str, ids: list[int], text: str, finish: str | None) -> dict[str, Any]:
    said = {"delta": {"content": text}} if path == CHAT else {"text": text}
    return {"id": "r", "choices": [{"index": 0, "finish_reason": finish, "token_ids": ids} | said]}
