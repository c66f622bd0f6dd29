"""How long an answer will be, asked before it is written: for the client, and for the queue.

Under vLLM's `--scheduling-policy priority` the request with the lowest number goes first. All
numbers are of one scale, in tokens:

    aging · seconds since 1970  +  tokens of the answer  +  the client's own priority, or 0

The shortest answer goes first. Alone that would let a long one wait for ever while short ones
keep coming, so that what arrives later starts with `aging` tokens a second more: after
(long - short) / aging seconds nothing new overtakes any more. The clock is one that all API
servers of an engine share, and a client's own priority moves a request by so many tokens, or
by so many / aging seconds, in whatever hour it comes.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from lenvm_vllm.api.prompts import to_predict
from lenvm_vllm.api.request_field import prefills
from lenvm_vllm.api.routes import Route
from lenvm_vllm.host import served
from lenvm_vllm.settings import Settings
from lenvm_vllm.target.request import LengthTarget, number
from lenvm_vllm.values.endpoint import async_http_client
from value_server.contract.units import PRIOR, UNITS
from value_server.contract.wire import PREDICT_PATH

_JSON = {"content-type": "application/json"}
_PAUSE_S = 5.0  # after a failure
_OF_THE_SERVER = (401, 404)  # wrong whatever it is asked: its token, or its model's name
_MEMORY = 0.9  # of the mean that stands for what could not be asked
_FURTHEST = 2**63 - 1  # the highest priority that vLLM takes; the lowest is less by one


@dataclass
class _Server:
    """silent_until: after a failure. blind_until: after one with pictures, which may take longer
    than anybody waits: then it is asked about none, but about texts."""

    http: httpx.AsyncClient
    silent_until: float = -math.inf
    blind_until: float = -math.inf


class Forecast:
    """One per API server process."""

    def __init__(
        self,
        settings: Settings,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        date: Callable[[], float] = time.time,
    ) -> None:
        """Connects to nothing yet. date: seconds since 1970."""
        options = settings.connection
        servers = {
            url: _Server(async_http_client(url, transport=transport, **options))
            for url in settings.servers
        }
        own = {**settings.adapters, "": settings.url}
        self._servers_of = {name: deque(servers[url] for url in urls) for name, urls in own.items()}
        self._aging = settings.aging
        self._clock = clock
        self._date = date
        self._mean: float | None = None

    async def expected(
        self,
        request: dict[str, Any],
        target: LengthTarget | None,
        route: Route,
        shown: bool = False,
    ) -> int | None:
        """Tokens that will be written here, as far as anybody knows. shown: as of `tokens`."""
        if not route.writes or prefills(request):
            return 1
        tokens = await self.tokens(request, target, shown)
        limit = route.limit_of(request)
        return tokens if tokens is None or limit is None else min(tokens, limit)

    def rank(self, request: dict[str, Any], tokens: int | None, route: Route) -> bool:
        """Give the request its place in vLLM's queue; whether it has got one."""
        scheduler = served.config and served.config.scheduler_config
        own = number(request.get("priority", 0))
        ranked = route.ranked and scheduler is not None and scheduler.policy == "priority"
        if not ranked or type(own) is not int:  # vLLM says what is wrong with it
            return False
        request["priority"] = self.priority(tokens, own)
        return True

    async def tokens(
        self, request: dict[str, Any], target: LengthTarget | None, shown: bool = False
    ) -> int | None:
        """Completion tokens to expect; None where nobody knows. Never raises.

        request: the JSON body of any of the endpoints, without its length target. shown: whether
        its pictures, which stand in it, are for the value model.
        """
        if target is None or target.scope != "completion" or target.mode == "tilt":
            return await self._predict(request, shown)
        low, high = _in_tokens(target).limits
        if target.mode == "equal_to" or (target.mode == "range" and low == high):
            return low
        natural = await self._predict(request, shown)
        if natural is None:
            return low if target.mode == "at_least" else high
        if target.mode != "at_most":
            natural = max(natural, low)
        return natural if target.mode == "at_least" else min(natural, high)

    def priority(self, tokens: int | None, own: int = 0) -> int:
        """The place of a request that comes now. What is not known counts as the mean so far.

        own: what the client gave; it is added.
        """
        if tokens is not None:
            old = float(tokens) if self._mean is None else self._mean
            self._mean = _MEMORY * old + (1 - _MEMORY) * tokens
        expected = tokens if tokens is not None else self._mean or 0
        place = round(self._aging * self._date() + expected) + own
        return max(-_FURTHEST, min(place, _FURTHEST))

    async def _predict(self, request: dict[str, Any], shown: bool) -> int | None:
        """The answer of the first server that has one; each request begins with another."""
        if (prompt := to_predict(request, shown)) is None or (body := _json_of(prompt)) is None:
            return None
        for server in self._asked(str(request.get("model"))):
            if self._clock() < max(server.silent_until, server.blind_until if shown else -math.inf):
                continue
            try:
                reply = await server.http.post(PREDICT_PATH, content=body, headers=_JSON)
                if reply.status_code in _OF_THE_SERVER or reply.status_code >= 500:
                    reply.raise_for_status()
                return max(1, round(reply.json()["predicted_tokens"])) if reply.is_success else None
            except (httpx.HTTPError, ValueError, KeyError, TypeError, OverflowError):
                if shown:
                    server.blind_until = self._clock() + _PAUSE_S
                else:
                    server.silent_until = self._clock() + _PAUSE_S
        return None

    def _asked(self, model: str) -> Iterator[_Server]:
        """An adapter's own, where it has some, then the base model's."""
        for name in (model, "") if model in self._servers_of else ("",):
            servers = self._servers_of[name]
            servers.rotate(-1)
            yield from list(servers)


def _json_of(prompt: dict[str, Any]) -> bytes | None:
    """None where no JSON says it, as NaN and half of a surrogate pair: no server is to blame."""
    try:
        return json.dumps(prompt, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        return None


def _in_tokens(target: LengthTarget) -> LengthTarget:
    """The target in tokens, as many as its words or characters take in plain English."""
    unit = target.unit
    return target if unit == UNITS[0] else target.in_tokens(lambda n: 1 + round(n * PRIOR[unit]))
