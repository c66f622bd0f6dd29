"""How long an answer will be, asked before it is written: for the client, and for the queue.

Under vLLM's `--scheduling-policy priority` the request with the shortest answer goes first.
Alone that would let a long one wait for ever while short ones keep coming, so that what arrives
later starts with `aging` tokens a second more: after (long - short) / aging seconds nothing new
overtakes any more.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from lenvm_vllm.endpoint import async_http_client
from lenvm_vllm.request import LengthTarget
from lenvm_vllm.settings import Settings
from value_server.contract.wire import PREDICT_PATH

_PAUSE_S = 5.0  # after a failure
_MEMORY = 0.9  # of the mean that stands for what could not be asked


@dataclass
class _Server:
    http: httpx.AsyncClient
    silent_until: float = -math.inf


class Forecast:
    """One per API server process."""

    def __init__(
        self,
        settings: Settings,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connects to nothing yet."""
        options = settings.connection
        self._servers = deque(
            _Server(async_http_client(url, transport=transport, **options)) for url in settings.url
        )
        self._aging = settings.aging
        self._clock = clock
        self._started = clock()
        self._mean: float | None = None

    async def tokens(self, request: dict[str, Any], target: LengthTarget | None) -> int | None:
        """Completion tokens to expect; None where nobody knows. Never raises.

        request: the JSON body of any of the endpoints, without its length target.
        """
        if target is None or target.scope != "completion" or target.mode == "tilt":
            return await self._predict(request)
        low, high = target.limits
        if low == high and target.mode not in ("at_most", "at_least"):
            return low
        natural = await self._predict(request)
        if target.mode == "at_most":
            return high if natural is None else min(natural, high)
        if target.mode == "at_least":
            return low if natural is None else max(natural, low)
        return high if natural is None else min(max(natural, low), high)

    def priority(self, tokens: int | None) -> int:
        """For vLLM, where the lowest goes first. What is not known counts as the mean so far."""
        if tokens is not None:
            old = float(tokens) if self._mean is None else self._mean
            self._mean = _MEMORY * old + (1 - _MEMORY) * tokens
        waited = self._aging * (self._clock() - self._started)
        return round(waited + (tokens if tokens is not None else self._mean or 0))

    async def _predict(self, request: dict[str, Any]) -> int | None:
        """The answer of the first server that has one; each request begins with another."""
        if (text := _text_of(request)) is None:
            return None
        self._servers.rotate(-1)
        for server in list(self._servers):
            if self._clock() < server.silent_until:
                continue
            try:
                reply = await server.http.post(PREDICT_PATH, json=text)
                if reply.status_code >= 500:
                    reply.raise_for_status()
                return max(1, round(reply.json()["predicted_tokens"])) if reply.is_success else None
            except (httpx.HTTPError, ValueError, KeyError, TypeError, OverflowError):
                server.silent_until = self._clock() + _PAUSE_S
        return None


def _text_of(request: dict[str, Any]) -> dict[str, Any] | None:
    """What `/v1/predict` takes; None for what is not plain text."""
    if isinstance(messages := request.get("messages", request.get("input")), list):
        system = request.get("system", request.get("instructions"))
        first = [{"role": "system", "content": system}] if isinstance(system, str) else []
        plain = all(
            isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
            for m in messages
        )
        return {"messages": [*first, *messages]} if plain and messages else None
    if isinstance(messages, str):
        return {"messages": [{"role": "user", "content": messages}]}
    prompt = request.get("prompt")
    if isinstance(prompt, str):
        return {"prompt": prompt}
    ids = isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)
    return {"token_ids": prompt} if ids else None
