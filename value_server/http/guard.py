"""ASGI middleware in front of all routes: bearer token, size of the body, and who asks.

A client is the holder of a token of its own; where all share one or need none, an address.
"""

import hmac
from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from value_server.contract.wire import model_path
from value_server.engine.errors import RequestError, TooLargeError, UnauthorizedError

OPEN_PATHS = ("/health", "/ready")  # of each model, too


class Guard:
    """Refuses requests before the application sees them; the others find `request.state.client`.

    Reads the whole body, at most `max_body_bytes` of it whatever its headers say, and replays it;
    what the application receives after it is what the client does next, a disconnect.
    `refuse` makes the response to an error.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        names: Sequence[str],
        tokens: Sequence[str],
        max_body_bytes: int,
        refuse: Callable[[Request, RequestError], Response],
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.refuse = refuse
        self._expected = [f"Bearer {token}".encode() for token in tokens]
        prefixes = ["", *map(model_path, names)]
        self._open = {prefix + path for prefix in prefixes for path in OPEN_PATHS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            client = self._client(scope)
            body = await self._read(scope, receive)
        except RequestError as error:
            await self.refuse(Request(scope), error)(scope, receive, send)
            return
        if body is not None:
            # In place: what is outside of this sees which model the path names, too.
            scope["state"] = {**scope.get("state", {}), "client": client}
            await self.app(scope, _replay(body, receive), send)

    def _client(self, scope: Scope) -> str:
        """Raises UnauthorizedError. Compares with all tokens in the time that the longest takes."""
        address = (scope.get("client") or ("local",))[0]
        if not self._expected or scope["path"] in self._open:
            return str(address)
        given = dict(scope["headers"]).get(b"authorization", b"")
        matches = [hmac.compare_digest(given, expected) for expected in self._expected]
        if not any(matches):
            raise UnauthorizedError("missing or wrong bearer token", "authorization")
        return str(address) if len(matches) == 1 else f"token {matches.index(True)}"

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client has left."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        self._check_size(int(length) if length.isdigit() else 0)
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            self._check_size(len(body))
            more = message.get("more_body", False)
        return bytes(body)

    def _check_size(self, size: int) -> None:
        if size > self.max_body_bytes:
            raise TooLargeError(f"the body is larger than {self.max_body_bytes} bytes", "body")


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    done = False

    async def replay() -> Message:
        nonlocal done
        if done:
            return await receive()
        done = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
