"""What the plugin changes in vLLM; the names it leans on stand in `host/names.py`.

vLLM runs `register` in each of its processes before it reads its arguments. Where the operator
wrote `--logits-processors lenvm_vllm` it completes the bare name, and adds the middleware for
the request field through vLLM's own `--middleware`.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from lenvm_vllm.host import served

logger = logging.getLogger("vllm.lenvm")

BARE = "lenvm_vllm"
PROCESSOR = "lenvm_vllm:LenvmLogitsProcessor"
MIDDLEWARE = "lenvm_vllm.plugin.AtTheRoutes"


@functools.cache
def register() -> None:
    """Once in a process; loads nothing of the plugin but this file."""
    from lenvm_vllm.host.names import EngineArgs
    from lenvm_vllm.telemetry.metrics import share_folder

    from_cli_args = EngineArgs.from_cli_args.__func__
    create_engine_config = EngineArgs.create_engine_config

    @functools.wraps(from_cli_args)
    def with_middleware(cls: type, args: Any) -> Any:
        served.logs_answers = bool(getattr(args, "enable_log_outputs", False))
        args.logits_processors = complete_names(getattr(args, "logits_processors", None))
        middleware = getattr(args, "middleware", None)
        named = PROCESSOR in (args.logits_processors or ())
        if named and middleware is not None:
            share_folder()
            if MIDDLEWARE not in middleware:
                args.middleware = [*middleware, MIDDLEWARE]
        if named and hasattr(args, "input_file"):
            _read_lengths_of_batch_files()
        return from_cli_args(cls, args)

    @functools.wraps(create_engine_config)
    def with_full_names(self: Any, *more: Any, **kwargs: Any) -> Any:
        self.logits_processors = complete_names(self.logits_processors)
        served.config = create_engine_config(self, *more, **kwargs)
        if _is_loaded(self.logits_processors):
            _watch_intake()
            warn_of_logprobs(served.config.device_config.device_type)
        return served.config

    EngineArgs.from_cli_args = classmethod(with_middleware)
    EngineArgs.create_engine_config = with_full_names


@functools.cache
def _read_lengths_of_batch_files() -> None:
    """`vllm run-batch` has no routes to stand at; there the field is read with the request.

    Once in a process.
    """
    from lenvm_vllm.api.request_field import take
    from lenvm_vllm.api.routes import BATCH, ROUTES
    from lenvm_vllm.host.names import ChatCompletionRequest

    beside = ("vllm_xargs", "tools", "tool_choice", "use_beam_search")

    def with_length(to_params: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(to_params)
        def read(self: Any, *more: Any, **kwargs: Any) -> Any:
            request = (self.model_extra or {}) | {name: getattr(self, name) for name in beside}
            take(request, ROUTES[BATCH], BATCH)
            self.vllm_xargs = request["vllm_xargs"]
            return to_params(self, *more, **kwargs)

        return read

    for name in ("to_sampling_params", "to_beam_search_params"):
        setattr(ChatCompletionRequest, name, with_length(getattr(ChatCompletionRequest, name)))


class AtTheRoutes:
    """What `--middleware` names: it puts the middleware right before the routes of the app.

    vLLM would put it outside of its own authentication and CORS, and of the operator's other
    middleware. There it would answer clients that have no key, and read what others have
    compressed.
    """

    def __init__(self, app: Any) -> None:
        from lenvm_vllm.settings import load_settings

        load_settings(served.config and served.config.additional_config)  # errors are told now
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The first call is the lifespan's, before any request."""
        from lenvm_vllm.api.middleware import LengthTargetMiddleware

        router = scope["app"].router
        if not isinstance(router.middleware_stack, LengthTargetMiddleware):
            router.middleware_stack = LengthTargetMiddleware(router.middleware_stack)
        await self._app(scope, receive, send)


def warn_of_logprobs(device: str) -> None:
    """vLLM compiles a function for them, and its engine does not survive where that fails."""
    from lenvm_vllm.host.machine import COMPILE_OFF, compiles, has_compiler

    if device == "cpu" and compiles() and not has_compiler():
        logger.warning(
            "no C++ compiler here: a request with logprobs would end vLLM's engine; "
            "set %s=1, or install g++",
            COMPILE_OFF,
        )


@functools.cache
def _watch_intake() -> None:
    """Each request of an engine with the plugin passes `intake.take_in`. Once in a process."""
    from lenvm_vllm.api.intake import take_in
    from lenvm_vllm.host.names import InputProcessor

    process_inputs = InputProcessor.process_inputs

    @functools.wraps(process_inputs)
    def with_targets(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        if _is_loaded(self.vllm_config.model_config.logits_processors):
            take_in(self.vllm_config, request)
        return request

    InputProcessor.process_inputs = with_targets


def complete_names(names: list[Any] | None) -> list[Any] | None:
    """`lenvm_vllm` becomes `lenvm_vllm:LenvmLogitsProcessor`, once; other names stay."""
    if names is None:
        return None
    full = [PROCESSOR if name == BARE else name for name in names]
    return [name for i, name in enumerate(full) if name != PROCESSOR or i == full.index(PROCESSOR)]


def _is_loaded(names: list[Any] | None) -> bool:
    """Whether they name our processor, or hold its class."""
    own = PROCESSOR.rpartition(":")[2]
    return any(name == PROCESSOR or getattr(name, "__name__", "") == own for name in names or ())
