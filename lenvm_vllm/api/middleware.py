"""ASGI middleware: the request field `length_target` becomes flat keys for the engine, and
`/metrics` shows what the engine counts of them. With the setting `forecast` a request is also
given its priority, and its answer a header with the length to expect.
The answer to a guided request tells how it ended; of several answers, or several endings of one,
those that end best are returned.

It stands inside of whatever else vLLM puts around its routes (`plugin.AtTheRoutes`).
Without that setting a request that asks for no length goes on byte for byte.
"""

import asyncio
import json
from typing import Any

from lenvm_vllm.api.answers import Answers
from lenvm_vllm.api.asgi import read, replay, request_of, resized
from lenvm_vllm.api.best_of import WholeAnswers
from lenvm_vllm.api.doors import CHAT, FORMS, MESSAGES, PATHS, TEXT, Door, door_at, whole
from lenvm_vllm.api.endings import Bounds, Endings, can_continue
from lenvm_vllm.api.forecast import Forecast
from lenvm_vllm.api.forms import watched
from lenvm_vllm.api.playground import Playground
from lenvm_vllm.host import served
from lenvm_vllm.settings import load_settings
from lenvm_vllm.target.admission import Limits, check_admission, only_prefills, resolved
from lenvm_vllm.target.misplaced import HINT, is_meant, misplaced
from lenvm_vllm.target.request import (
    FIELD,
    HAS_CALLS,
    REQUEST_ID,
    LengthTarget,
    LengthTargetError,
    is_prefill,
    number,
)
from lenvm_vllm.telemetry.metrics import exposition, waiting_requests
from lenvm_vllm.telemetry.progress import Known
from lenvm_vllm.text.tokenizer import tokenizer_of

PREDICTED = "lenvm-predicted-tokens"  # response header


class LengthTargetMiddleware:
    def __init__(self, app: Any) -> None:
        self._app = app
        settings = load_settings(_served("additional_config"))
        self._forecast = Forecast(settings) if settings.forecast else None
        self._playground = Playground() if settings.playground else None
        self._settings = settings
        self._known = Known()
        rounds = asyncio.Semaphore(settings.endings_at_once)
        self._bounds = Bounds(rounds, settings.endings_patience, waiting_requests)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        method = scope["method"] if scope["type"] == "http" else None
        path = "" if method is None else _path(scope)
        if method == "GET" and path == "/metrics":
            await self._app(_plain(scope), receive, _with_ours(send))
        elif method == "POST" and path in PATHS:
            await self._answer(scope, receive, send)
        elif method == "POST" and path in FORMS:
            await self._app(scope, watched(receive), send)
        elif self._playground is not None and self._playground.serves(method, path):
            await self._playground(scope, path, send)
        else:
            await self._app(scope, receive, send)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request that may ask for a length."""
        messages, path = await read(receive), _path(scope)
        body = b"".join(message.get("body", b"") for message in messages)
        request = _parsed(body) if self._forecast is not None or HINT.search(body) else None
        if request is None:
            await self._app(scope, replay(messages, receive), send)
            return
        door, changed = door_at(path, request), FIELD in request
        try:
            target = take(request, door, path, _request_id(scope))
        except LengthTargetError as error:
            await _refuse(send, str(error), path)
            return
        predicted = None
        if self._forecast is not None:
            predicted = await _expected(self._forecast, request, target, door)
            changed |= _rank(self._forecast, request, predicted, door)
            if predicted is not None and door.writes:
                send = _with_header(send, PREDICTED, predicted)
        app = self._answering(request, target, door, predicted)
        if changed or app is not self._app:
            new = json.dumps(request).encode()
            scope = {**scope, "headers": resized(scope["headers"], len(new))}
            messages = [request_of(new)]
        await app(scope, replay(messages, receive), send)

    def _answering(
        self,
        request: dict[str, Any],
        target: LengthTarget | None,
        door: Door,
        predicted: int | None,
    ) -> Any:
        """The application that answers: vLLM's own, or for a guided request one around it."""
        if target is None or not door.tells:
            return self._app
        common = (self._app, target, self._known, predicted)
        if target.best_of > 1:
            return WholeAnswers(*common, target.best_of)
        config = served.config
        if config is not None and door.choices and can_continue(request, target):
            endings = target.endings or self._default_endings(target, config)
            longest = config.model_config.max_model_len
            if endings > 1 and (tokenizer := tokenizer_of(config)) is not None:
                return Endings(*common, endings, longest, tokenizer, self._bounds)
        return Answers(*common)

    def _default_endings(self, target: LengthTarget, config: Any) -> int:
        """One where others cost more than their own tokens: the text is computed anew where vLLM
        keeps no prefixes, and on another engine than the one that has it."""
        cheap = config.cache_config.enable_prefix_caching
        cheap &= config.parallel_config.data_parallel_size == 1
        return self._settings.endings if cheap and target.tolerance is not None else 1


def take(
    request: dict[str, Any], door: Door, path: str, request_id: str | None = None
) -> LengthTarget | None:
    """The length target of a request, moved in it to where the plugins of vLLM find it.

    None also where this engine only prefills for another. request_id: goes along, for the logs
    of the value server. Raises LengthTargetError.
    """
    _check_names(request, door)
    params = door.params_of(request)
    xargs = params.get(door.xargs) or {}
    given = request.pop(FIELD, None)
    if given is None:
        target = LengthTarget.from_extra_args(xargs) if isinstance(xargs, dict) else None
        target = target and resolved(target, served.config)
    else:
        target = resolved(LengthTarget.parse(given), served.config)
        if not isinstance(xargs, dict):
            raise LengthTargetError(f"{door.holder}: expected an object, got {xargs!r}")
        if twice := [key for key in xargs if is_meant(key)]:
            raise LengthTargetError(f"{FIELD}: given beside {door.holder}.{twice[0]}")
        known = {REQUEST_ID: request_id} if request_id else {}
        params[door.xargs] = {**xargs, **known, **target.to_xargs()}
    if target is None:
        return None
    if door.refusal:
        raise LengthTargetError(f"{FIELD}: not on {path}: {door.refusal}")
    _check(target, request, door)
    if request.get("tools") and request.get("tool_choice") not in ("none", {"type": "none"}):
        params[door.xargs] = {**params[door.xargs], HAS_CALLS: 1}
    return None if _prefills(request) else target


def _check_names(request: dict[str, Any], door: Door) -> None:
    """Raises LengthTargetError for a name or a place that vLLM would silently ignore."""
    slips = [(name, value) for name, value in request.items() if name != FIELD and is_meant(name)]
    for name, value in (*slips, *misplaced(request, door.holder)):
        raise LengthTargetError(
            f"{name}: unknown field, got {value!r}; a length, with its parts, is given as {FIELD} "
            "at the top level of the body"
        )


async def _expected(
    forecast: Forecast, request: dict[str, Any], target: LengthTarget | None, door: Door
) -> int | None:
    """Tokens that will be written here, as far as anybody knows."""
    if not door.writes or _prefills(request):
        return 1
    tokens = await forecast.tokens(request, target)
    limit = door.limit_of(request)
    return tokens if tokens is None or limit is None else min(tokens, limit)


def _rank(forecast: Forecast, request: dict[str, Any], tokens: int | None, door: Door) -> bool:
    """Give the request its place in vLLM's queue; whether it has got one."""
    scheduler, own = _served("scheduler_config"), number(request.get("priority", 0))
    ranked = door.ranked and scheduler is not None and scheduler.policy == "priority"
    if not ranked or type(own) is not int:  # vLLM says what is wrong with it
        return False
    request["priority"] = forecast.priority(tokens, own)
    return True


def _prefills(request: dict[str, Any]) -> bool:
    """Whether another engine writes the answer, and the one token of this one is thrown away."""
    return is_prefill(request) or only_prefills(served.config)


def _parsed(body: bytes) -> dict[str, Any] | None:
    """A request; None for one of which vLLM says what is wrong with it."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return request if isinstance(request, dict) else None


def _served(name: str) -> Any:
    """A part of the configuration that this process serves; None outside vLLM."""
    config = served.config
    return None if config is None else getattr(config, name)


def _check(target: LengthTarget, request: dict[str, Any], door: Door) -> None:
    """Raises LengthTargetError."""
    params = door.params_of(request)
    if request.get("use_beam_search"):
        # vLLM searches beams without any logits processor: the target would be lost silently.
        raise LengthTargetError(f"use_beam_search: true contradicts {FIELD}")
    if request.get("prompt_embeds"):
        raise LengthTargetError(
            f"prompt_embeds: contradicts {FIELD}, whose values are those of tokens"
        )
    if target.best_of > 1:
        _check_best_of(target.best_of, request, door)
    prefill = _prefills(request)
    limits = Limits(
        max_tokens=None if prefill else door.limit_of(request),
        min_tokens=0 if prefill else whole(params, "min_tokens") or 0,
        ignore_eos=params.get("ignore_eos") is True,
        thinking_token_budget=whole(params, "thinking_token_budget"),
        shows_stop=params.get("include_stop_str_in_output") is True,
    )
    check_admission(target, limits, served.config)


def _check_best_of(best_of: int, request: dict[str, Any], door: Door) -> None:
    """Raises LengthTargetError."""
    name = f"{FIELD}.best_of: {best_of}"
    if not door.choices:
        raise LengthTargetError(f"{name}: only {CHAT} and {TEXT} choose among answers")
    for other in ("stream", "echo"):
        if request.get(other):
            raise LengthTargetError(f"{name} contradicts {other}: {request[other]!r}")
    n = request.get("n")
    if n is not None and not (type(n) is int and 1 <= n <= best_of):
        raise LengthTargetError(f"n: {n!r}, must be from 1 to {name}")


def _request_id(scope: Any) -> str | None:
    """The id by which vLLM itself then calls the request."""
    for key, value in scope["headers"]:
        if key.lower() == b"x-request-id":
            return str(value.decode("latin-1"))
    return None


def _path(scope: Any) -> str:
    return str(scope["path"].removeprefix(scope.get("root_path", ""))).rstrip("/")


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


def _with_header(send: Any, name: str, value: int) -> Any:
    """An ASGI `send` that adds a header to the answer."""

    async def send_more(message: Any) -> None:
        if message["type"] == "http.response.start":
            header = (name.encode(), str(value).encode())
            message = {**message, "headers": [*message["headers"], header]}
        await send(message)

    return send_more


async def _refuse(send: Any, message: str, path: str) -> None:
    """HTTP 400 in the form of OpenAI, or of Anthropic, which has a type around it."""
    error = {"message": message, "type": "BadRequestError", "param": FIELD, "code": 400}
    around = {"type": "error"} if path == MESSAGES else {}
    body = json.dumps(around | {"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
