"""The few moves of ASGI that the middleware is made of."""

import asyncio
import json
from dataclasses import dataclass, replace
from typing import Any

_GRACE_S = 1.0  # in which vLLM ends what nobody waits for any more


def path_of(scope: Any) -> str:
    """Of a request, behind what the application is mounted at."""
    return str(scope["path"].removeprefix(scope.get("root_path", ""))).rstrip("/")


async def read(receive: Any) -> list[Any]:
    """The messages of one request, up to its last or to a disconnect."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False):
        messages.append(await receive())
    return messages


def parsed(body: bytes) -> dict[str, Any] | None:
    """A request; None for one of which vLLM says what is wrong with it."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return request if isinstance(request, dict) else None


def replay(messages: list[Any], receive: Any) -> Any:
    """An ASGI `receive` that gives `messages` first."""
    waiting = iter(messages)

    async def replayed() -> Any:
        for message in waiting:
            return message
        return await receive()

    return replayed


def until(gone: asyncio.Event, receive: Any) -> Any:
    """An ASGI `receive` of a client who hangs up with that event, too."""

    async def received() -> Any:
        waits = [asyncio.ensure_future(one) for one in (receive(), gone.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return {"type": "http.disconnect"} if gone.is_set() else waits[0].result()
        finally:
            for one in waits:
                one.cancel()

    return received


def resized(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    """The same headers of a body of another length, which is told in one way alone: a proxy that
    heard of chunks as well might read two requests."""
    told = (b"content-length", b"transfer-encoding")
    kept = [(name, value) for name, value in headers if name.lower() not in told]
    return [*kept, (b"content-length", b"%d" % length)]


@dataclass
class Reply:
    """A whole answer. start: its first ASGI message.
    answer: its JSON; None for an error, and where vLLM gave up since the client is gone."""

    start: Any
    body: bytes
    answer: dict[str, Any] | None

    async def send(self, send: Any, headers: dict[str, int]) -> None:
        """Its JSON as vLLM writes it, or what is no JSON as it is, with some headers more."""
        body = self.body if self.answer is None else compact(self.answer)
        more = [(name.encode(), b"%d" % value) for name, value in headers.items()]
        await send({**self.start, "headers": [*resized(self.start["headers"], len(body)), *more]})
        await send({"type": "http.response.body", "body": body})


@dataclass(frozen=True)
class Upstream:
    """vLLM's application, behind one request of a client: to be asked once or more."""

    app: Any
    scope: Any
    receive: Any

    async def forward(self, request: Any, send: Any) -> None:
        """Ask with the JSON `request` in place of the client's; the answer goes to `send`."""
        body = json.dumps(request).encode()
        scope = {**self.scope, "headers": resized(self.scope["headers"], len(body))}
        message = {"type": "http.request", "body": body, "more_body": False}
        await self.app(scope, replay([message], self.receive), send)

    async def listen(self, request: Any, send: Any, enough: asyncio.Event) -> None:
        """The same until there is `enough`, or this is cancelled: then it hangs up on vLLM, which
        would otherwise sample on, for nobody."""
        vllm = replace(self, receive=until(enough, self.receive))
        answering = asyncio.ensure_future(vllm.forward(request, send))
        try:
            await asyncio.shield(answering)
        except asyncio.CancelledError:
            enough.set()
            asyncio.get_running_loop().call_later(_GRACE_S, answering.cancel)
            raise

    async def ask(self, request: Any) -> Reply:
        """The same, with the answer kept."""
        start: Any = {}
        pieces: list[bytes] = []

        async def keep(message: Any) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                pieces.append(message.get("body", b""))

        await self.forward(request, keep)
        body = b"".join(pieces)
        return Reply(start, body, json.loads(body) if start["status"] == 200 else None)


async def send_whole(
    send: Any, status: int, headers: dict[str, str], body: bytes, shown: bool = True
) -> None:
    """An answer of our own; without its body where that is not `shown`."""
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    start = {"type": "http.response.start", "status": status}
    await send({**start, "headers": resized(encoded, len(body))})
    await send({"type": "http.response.body", "body": body if shown else b""})


def with_header(send: Any, name: str, value: int) -> Any:
    """An ASGI `send` that adds a header to the answer."""

    async def send_more(message: Any) -> None:
        if message["type"] == "http.response.start":
            header = (name.encode(), b"%d" % value)
            message = {**message, "headers": [*message["headers"], header]}
        await send(message)

    return send_more


def compact(answer: Any) -> bytes:
    """JSON as vLLM writes it."""
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
