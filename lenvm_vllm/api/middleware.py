"""ASGI middleware: takes each request that may ask for a length, and has it answered.

The field `length_target` becomes flat keys for the engine (`request_field.py`), or a 400
(`errors.py`). The answer to a guided request tells how it ended (`answers.py`); of several
answers, or several endings of one, those that end best are returned (`whole_answers.py`,
`endings.py`). With the setting `forecast` a request is also given its priority, and its answer a
header with the length to expect. `/metrics` shows what the engine counts of all this.

It stands inside of whatever else vLLM puts around its routes (`plugin.AtTheRoutes`).
Without that setting a request that asks for no length goes on byte for byte.
"""

import asyncio
from typing import Any

from lenvm_vllm.api.answers import Answers
from lenvm_vllm.api.asgi import Upstream, parsed, path_of, read, replay, with_header
from lenvm_vllm.api.continuation import can_continue
from lenvm_vllm.api.endings import Bounds, Endings
from lenvm_vllm.api.errors import refuse
from lenvm_vllm.api.forecast import Forecast
from lenvm_vllm.api.pictures import Pictures
from lenvm_vllm.api.playground import Playground
from lenvm_vllm.api.recordings import watched
from lenvm_vllm.api.request_field import take
from lenvm_vllm.api.routes import PATHS, RECORDINGS, Route, route_at, streams
from lenvm_vllm.api.whole_answers import WholeAnswers
from lenvm_vllm.host import served
from lenvm_vllm.settings import load_settings
from lenvm_vllm.target.misplaced import HINT
from lenvm_vllm.target.request import FIELD, LengthTarget, LengthTargetError
from lenvm_vllm.telemetry.metrics import exposition, waiting_requests
from lenvm_vllm.telemetry.progress import Known
from lenvm_vllm.text.tokenizer import tokenizer_of

PREDICTED = "lenvm-predicted-tokens"  # response header


class LengthTargetMiddleware:
    def __init__(self, app: Any) -> None:
        self._app = app
        settings = load_settings(served.config and served.config.additional_config)
        self._forecast = Forecast(settings) if settings.forecast else None
        self._playground = Playground() if settings.playground else None
        self._pictures = Pictures(settings)
        self._settings = settings
        self._known = Known()
        rounds = asyncio.Semaphore(settings.endings_at_once)
        patience, pause = settings.endings_patience, settings.endings_pause_s
        self._bounds = Bounds(rounds, patience, pause, waiting_requests)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        method = scope["method"] if scope["type"] == "http" else None
        path = "" if method is None else path_of(scope)
        if method == "GET" and path == "/metrics":
            await self._app(_plain(scope), receive, _with_ours(send))
        elif method == "POST" and path in PATHS:
            await self._answer(scope, receive, send)
        elif method == "POST" and path in RECORDINGS:
            await self._app(scope, watched(receive), send)
        elif self._playground is not None and self._playground.serves(method, path):
            await self._playground(scope, path, send)
        else:
            await self._app(scope, receive, send)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request that may ask for a length."""
        messages, path = await read(receive), path_of(scope)
        body = b"".join(message.get("body", b"") for message in messages)
        request = parsed(body) if self._forecast is not None or HINT.search(body) else None
        if request is None:
            await self._app(scope, replay(messages, receive), send)
            return
        route, changed = route_at(path, request), FIELD in request
        try:
            target = take(request, route, path, _request_id(scope))
        except LengthTargetError as error:
            await refuse(send, str(error), path)
            return
        if target is not None and target.wants_values and route.writes:
            await self._pictures.take(request, route, path)
        predicted = None
        if self._forecast is not None:
            shown = await self._pictures.stand_in(request, path)
            predicted = await self._forecast.expected(request, target, route, shown)
            changed |= self._forecast.rank(request, predicted, route)
            if predicted is not None and route.writes:
                send = with_header(send, PREDICTED, predicted)
        vllm = Upstream(self._app, scope, receive)
        if target is not None and route.tells:
            answers = self._answers(request, target, route, predicted)
            await answers.respond(vllm, request, send)
        elif changed:
            await vllm.forward(request, send)
        else:
            await self._app(scope, replay(messages, receive), send)

    def _answers(
        self, request: dict[str, Any], target: LengthTarget, route: Route, predicted: int | None
    ) -> Answers:
        """How a guided request is answered: with one text, or the best of several."""
        config = served.config
        if target.best_of > 1:
            return WholeAnswers(target, self._known, predicted)
        waits = not streams(request) or self._stops_for_endings(target)
        if config is not None and route.choices and waits and can_continue(request, target):
            endings = target.endings or self._default_endings(target, config)
            if endings > 1 and (tokenizer := tokenizer_of(config)) is not None:
                return Endings(
                    target,
                    self._known,
                    predicted,
                    endings=endings,
                    limits=(route.limit_of(request), _operators_limit(config)),
                    max_model_len=config.model_config.max_model_len,
                    tokenizer=tokenizer,
                    bounds=self._bounds,
                )
        return Answers(target, self._known, predicted)

    def _stops_for_endings(self, target: LengthTarget) -> bool:
        """Whether its stream does. Without rails a text may end far behind its target."""
        pause = min(self._settings.endings_pause_s, self._settings.endings_patience)
        return pause > 0 and target.tolerance is not None

    def _default_endings(self, target: LengthTarget, config: Any) -> int:
        """One where others cost more than their own tokens: the text is computed anew where vLLM
        keeps no prefixes, and on another engine than the one that has it."""
        cheap = config.cache_config.enable_prefix_caching
        cheap &= config.parallel_config.data_parallel_size == 1
        return self._settings.endings if cheap and target.tolerance is not None else 1


def _operators_limit(config: Any) -> int | None:
    """The most tokens of any answer, by `--override-generation-config`."""
    limit: int | None = config.model_config.override_generation_config.get("max_new_tokens")
    return limit


def _request_id(scope: Any) -> str | None:
    """The id by which vLLM itself then calls the request."""
    for key, value in scope["headers"]:
        if key.lower() == b"x-request-id":
            return str(value.decode("latin-1"))
    return None


def _plain(scope: Any) -> Any:
    """Asks for Prometheus' text format, uncompressed: something to append to."""
    dropped = (b"accept", b"accept-encoding")
    return {**scope, "headers": [(k, v) for k, v in scope["headers"] if k.lower() not in dropped]}


def _with_ours(send: Any) -> Any:
    """An ASGI `send` that appends our metrics."""

    async def send_more(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = [(k, v) for k, v in message["headers"] if k.lower() != b"content-length"]
            message = {**message, "headers": headers}
        elif not message.get("more_body", False):
            message = {**message, "body": message.get("body", b"") + exposition()}
        await send(message)

    return send_more
