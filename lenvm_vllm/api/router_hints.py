"""ASGI middleware for what stands in front of a router: each request tells it the length to expect.

A router balances load before any engine has seen the request. So the value server is asked here,
and the request goes on with

    lenvm-predicted-tokens: 323                         a header, for any router
    {"nvext": {"agent_hints": {"osl": 323}}}            of chat and text completions, for Dynamo

Nothing else of it changes. A length target counts as in `forecast.py`. Without an answer of the
value server the request goes on as it came, and so does one that is no JSON object.
"""

from typing import Any

from lenvm_vllm.api.asgi import Upstream, parsed, path_of, read, replay
from lenvm_vllm.api.forecast import Forecast
from lenvm_vllm.api.middleware import PREDICTED
from lenvm_vllm.api.routes import CHAT, PATHS, TEXT, Route, route_at
from lenvm_vllm.settings import Settings, load_settings
from lenvm_vllm.target.request import FIELD, LengthTarget, LengthTargetError

_HEADER = PREDICTED.encode()
_MOST = 2**32 - 1  # Dynamo's `osl` has 32 bits, without a sign


class RouterHints:
    """app: an ASGI application that hands requests to the router.

    settings: where the value servers are, by default as the environment has it. dynamo: whether
    `nvext` is written too; a client's own `osl` stays.
    """

    def __init__(
        self,
        app: Any,
        settings: Settings | None = None,
        dynamo: bool = True,
        forecast: Forecast | None = None,
    ) -> None:
        self._app = app
        self._dynamo = dynamo
        self._forecast = forecast or Forecast(settings or load_settings())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if "headers" not in scope:  # the server's own start and end
            await self._app(scope, receive, send)
            return
        # What a client says there is not ours to vouch for.
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != _HEADER]
        scope, path = {**scope, "headers": headers}, path_of(scope)
        if scope.get("method") != "POST" or path not in PATHS:
            await self._app(scope, receive, send)
            return
        messages = await read(receive)
        request = parsed(b"".join(message.get("body", b"") for message in messages))
        route = None if request is None else route_at(path, request)
        tokens = None
        if request is not None and route is not None and route.writes:
            tokens = await self._forecast.expected(request, _target(request, route), route)
        if tokens is None:
            await self._app(scope, replay(messages, receive), send)
            return
        scope = {**scope, "headers": [*headers, (_HEADER, b"%d" % tokens)]}
        if self._dynamo and path in (CHAT, TEXT) and with_osl(request, tokens):
            await Upstream(self._app, scope, receive).forward(request, send)
        else:
            await self._app(scope, replay(messages, receive), send)


def with_osl(request: dict[str, Any] | None, tokens: int) -> bool:
    """Put the expected tokens into a request for Dynamo; whether that was done.

    Not where the client has an `osl`, or forms of its own in these places.
    """
    nvext = {} if request is None else request.get("nvext") or {}
    hints = nvext.get("agent_hints") or {} if isinstance(nvext, dict) else None
    if request is None or not isinstance(hints, dict) or hints.get("osl") is not None:
        return False
    request["nvext"] = {**nvext, "agent_hints": {**hints, "osl": min(tokens, _MOST)}}
    return True


def _target(request: dict[str, Any], route: Route) -> LengthTarget | None:
    """Its length target; None where it has none that can be read, which the engine tells."""
    xargs = route.params_of(request).get(route.xargs)
    try:
        if request.get(FIELD) is not None:
            return LengthTarget.parse(request[FIELD])
        return LengthTarget.from_extra_args(xargs) if isinstance(xargs, dict) else None
    except LengthTargetError:
        return None
