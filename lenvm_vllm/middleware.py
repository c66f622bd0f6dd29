"""ASGI middleware: the request field `length_target` becomes flat keys in `vllm_xargs`, and
`/metrics` shows what the engine counts of them. With the setting `forecast` a request is also
given its priority, and its answer a header with the length to expect.
The answer to a guided request tells how it ended; of several answers, or several endings of one,
those that end best are returned.

Without that setting a request that holds no `length_` goes on byte for byte.
"""

import asyncio
import json
from typing import Any

from lenvm_vllm import vllm_hooks
from lenvm_vllm.admission import check_admission, resolved
from lenvm_vllm.answers import Answers
from lenvm_vllm.asgi import read, replay, request_of, resized
from lenvm_vllm.best_of import WholeAnswers
from lenvm_vllm.endings import CHAT, TEXT, Bounds, Endings, can_continue
from lenvm_vllm.forecast import Forecast
from lenvm_vllm.metrics import exposition, waiting_requests
from lenvm_vllm.progress import Known
from lenvm_vllm.request import FIELD, PREFIX, LengthTarget, LengthTargetError
from lenvm_vllm.sentences import tokenizer_of
from lenvm_vllm.settings import load_settings
from lenvm_vllm.state import REQUEST_ID

MESSAGES = "/v1/messages"  # Anthropic's form
PATHS = (CHAT, f"{CHAT}/batch", TEXT, "/v1/responses", MESSAGES)
PREDICTED = "lenvm-predicted-tokens"  # response header
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")  # the first one counts
_TEXT_LIMIT = 16  # of a text completion that sets none, since OpenAI's first
# Fields of vLLM's own requests that happen to start with the same letters.
_OTHERS = {"length_penalty"}


class LengthTargetMiddleware:
    def __init__(self, app: Any) -> None:
        self._app = app
        settings = load_settings(_served("additional_config"))
        self._forecast = Forecast(settings) if settings.forecast else None
        self._settings = settings
        self._known = Known()
        rounds = asyncio.Semaphore(settings.endings_at_once)
        self._bounds = Bounds(rounds, settings.endings_patience, waiting_requests)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "GET" and _path(scope) == "/metrics":
            await self._app(_plain(scope), receive, _with_ours(send))
            return
        if scope["type"] != "http" or scope["method"] != "POST" or _path(scope) not in PATHS:
            await self._app(scope, receive, send)
            return
        messages = await read(receive)
        body = b"".join(message.get("body", b"") for message in messages)
        if self._forecast is None and PREFIX.encode() not in body:
            await self._app(scope, replay(messages, receive), send)
            return
        try:
            new = rewrite(body, _path(scope), _request_id(scope))
        except LengthTargetError as error:
            await _refuse(send, str(error))
            return
        predicted = None
        if self._forecast is not None:
            new, predicted = await _with_forecast(self._forecast, new or body, _path(scope))
            if predicted is not None:
                send = _with_header(send, PREDICTED, predicted)
        app = self._answering(new or body, _path(scope), predicted)
        if app is not self._app:
            new = new or body
        if new is not None:
            scope = {**scope, "headers": resized(scope["headers"], len(new))}
            messages = [request_of(new)]
        await app(scope, replay(messages, receive), send)

    def _answering(self, body: bytes, path: str, predicted: int | None) -> Any:
        """The application that answers: vLLM's own, or for a guided request one around it."""
        request, target = _target_of(body)
        if target is None:
            return self._app
        common = (self._app, target, self._known, predicted)
        if target.best_of > 1:
            return WholeAnswers(*common, target.best_of)
        config = vllm_hooks.served_config
        if config is not None and can_continue(request, target, path):
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


def rewrite(body: bytes, path: str, request_id: str | None = None) -> bytes | None:
    """The body with its length target moved to `vllm_xargs`; None when nothing is to change.

    request_id: goes along, for the logs of the value server. Raises LengthTargetError.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None  # vLLM says what is wrong with it
    if not isinstance(request, dict):
        return None
    names = [k for k in request if k.startswith(PREFIX) and k not in _OTHERS and k != FIELD]
    if names:
        raise LengthTargetError(
            f"{names[0]}: unknown field, got {request[names[0]]!r}; its parts go into {FIELD}"
        )
    xargs = request.get("vllm_xargs") or {}
    if request.get(FIELD) is None:
        flat = LengthTarget.from_extra_args(xargs) if isinstance(xargs, dict) else None
        if flat:
            _check(flat, request, path)
        return json.dumps(request).encode() if request.pop(FIELD, 0) is None else None
    target = resolved(LengthTarget.parse(request.pop(FIELD)), vllm_hooks.served_config)
    _check(target, request, path)
    if not isinstance(xargs, dict):
        raise LengthTargetError(f"vllm_xargs: expected an object, got {xargs!r}")
    if twice := [key for key in xargs if key.startswith(PREFIX)]:
        raise LengthTargetError(f"{FIELD}: given beside vllm_xargs.{twice[0]}")
    known = {REQUEST_ID: request_id} if request_id else {}
    request["vllm_xargs"] = {**xargs, **known, **target.to_xargs()}
    return json.dumps(request).encode()


async def _with_forecast(forecast: Forecast, body: bytes, path: str) -> tuple[bytes, int | None]:
    """The body with its priority, and the tokens to expect.

    body: without a length target of its own. A priority that the client gave stays.
    """
    request, target = _target_of(body)
    if request is None:
        return body, None
    tokens = await forecast.tokens(request, target)
    if tokens is not None and (limit := _limit(request, path)) is not None:
        tokens = min(tokens, limit)
    scheduler = _served("scheduler_config")
    ranked = scheduler is not None and scheduler.policy == "priority"
    if ranked and "priority" not in request and path != MESSAGES:  # it has none
        body = json.dumps(request | {"priority": forecast.priority(tokens)}).encode()
    return body, tokens


def _target_of(body: bytes) -> tuple[Any, LengthTarget | None]:
    """A request and its target; None, None for one of which vLLM says what is wrong with it."""
    try:
        request = json.loads(body)
        target = LengthTarget.from_extra_args(request.get("vllm_xargs"))
        return request, target and resolved(target, vllm_hooks.served_config)
    except (ValueError, RecursionError, AttributeError, TypeError):
        return None, None


def _served(name: str) -> Any:
    """A part of the configuration that this process serves; None outside vLLM."""
    config = vllm_hooks.served_config
    return None if config is None else getattr(config, name)


def _check(target: LengthTarget, request: dict[str, Any], path: str) -> None:
    """Raises LengthTargetError."""
    if request.get("use_beam_search"):
        # vLLM searches beams without any logits processor: the target would be lost silently.
        raise LengthTargetError(f"use_beam_search: true contradicts {FIELD}")
    if request.get("prompt_embeds"):
        raise LengthTargetError(
            f"prompt_embeds: contradicts {FIELD}, whose values are those of tokens"
        )
    if target.best_of > 1:
        _check_best_of(target.best_of, request, path)
    check_admission(
        target,
        max_tokens=_limit(request, path),
        min_tokens=_whole(request, "min_tokens") or 0,
        ignore_eos=request.get("ignore_eos") is True,
        thinking_token_budget=_whole(request, "thinking_token_budget"),
        config=vllm_hooks.served_config,
    )


def _check_best_of(best_of: int, request: dict[str, Any], path: str) -> None:
    """Raises LengthTargetError."""
    name = f"{FIELD}.best_of: {best_of}"
    if path not in (CHAT, TEXT):
        raise LengthTargetError(f"{name}: only {CHAT} and {TEXT} choose among answers")
    for other in ("stream", "echo"):
        if request.get(other):
            raise LengthTargetError(f"{name} contradicts {other}: {request[other]!r}")
    n = request.get("n")
    if n is not None and not (type(n) is int and 1 <= n <= best_of):
        raise LengthTargetError(f"n: {n!r}, must be from 1 to {name}")


def _limit(request: dict[str, Any], path: str) -> int | None:
    """The most tokens that the answer may have; None where only the model's context ends it."""
    if all(request.get(name) is None for name in _LIMITS):
        return _TEXT_LIMIT if path == TEXT else None
    return next((n for name in _LIMITS if (n := _whole(request, name)) is not None), None)


def _whole(request: dict[str, Any], name: str) -> int | None:
    """A number of the request; None for anything else, which is left to vLLM."""
    return value if type(value := request.get(name)) is int else None


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


async def _refuse(send: Any, message: str) -> None:
    """HTTP 400 in the OpenAI form."""
    error = {"message": message, "type": "BadRequestError", "param": FIELD, "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
