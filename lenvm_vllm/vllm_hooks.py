"""What the plugin changes in vLLM; the names it leans on stand in `vllm_names`.

vLLM runs `register` in each of its processes before it reads its arguments. Where the operator
wrote `--logits-processors lenvm_vllm` it completes the bare name, and adds the middleware for
the request field through vLLM's own `--middleware`.
"""

import functools
import logging
from typing import Any

logger = logging.getLogger("vllm.lenvm")

BARE = "lenvm_vllm"
PROCESSOR = "lenvm_vllm:LenvmLogitsProcessor"
MIDDLEWARE = "lenvm_vllm.vllm_hooks.AtTheRoutes"

# The VllmConfig that this process made last: what a request may ask for depends on it.
served_config: Any = None


def register() -> None:
    """Idempotent; loads nothing of the plugin but this file."""
    from lenvm_vllm.metrics import share_folder
    from lenvm_vllm.vllm_names import EngineArgs

    if getattr(EngineArgs, "_lenvm_registered", False):
        return
    EngineArgs._lenvm_registered = True
    from_cli_args = EngineArgs.from_cli_args.__func__
    create_engine_config = EngineArgs.create_engine_config

    @functools.wraps(from_cli_args)
    def with_middleware(cls: type, args: Any) -> Any:
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
        global served_config
        self.logits_processors = complete_names(self.logits_processors)
        served_config = create_engine_config(self, *more, **kwargs)
        if PROCESSOR in (self.logits_processors or ()):
            warn_of_logprobs(served_config.device_config.device_type)
        return served_config

    EngineArgs.from_cli_args = classmethod(with_middleware)
    EngineArgs.create_engine_config = with_full_names


def _read_lengths_of_batch_files() -> None:
    """`vllm run-batch` has no routes to stand at; there the field is read with the request."""
    from lenvm_vllm.doors import BATCH, DOORS
    from lenvm_vllm.middleware import take
    from lenvm_vllm.vllm_names import ChatCompletionRequest

    to_sampling_params = ChatCompletionRequest.to_sampling_params
    if hasattr(to_sampling_params, "__wrapped__"):
        return

    @functools.wraps(to_sampling_params)
    def with_length(self: Any, *more: Any, **kwargs: Any) -> Any:
        request = (self.model_extra or {}) | {"vllm_xargs": self.vllm_xargs}
        take(request, DOORS[BATCH], BATCH)
        self.vllm_xargs = request["vllm_xargs"]
        return to_sampling_params(self, *more, **kwargs)

    ChatCompletionRequest.to_sampling_params = with_length


def only_prefills() -> bool:
    """Whether the served vLLM prepares answers for others to write: the prefill pod of a
    disaggregated pair, or the encoder of one. Of the one token that it writes nobody reads."""
    kv = getattr(served_config, "kv_transfer_config", None)
    ec = getattr(served_config, "ec_transfer_config", None)
    roles = getattr(kv, "kv_role", None), getattr(ec, "ec_role", None)
    return "kv_producer" in roles or "ec_producer" in roles


class AtTheRoutes:
    """What `--middleware` names: it puts the middleware right before the routes of the app.

    vLLM would put it outside of its own authentication and CORS, and of the operator's other
    middleware. There it would answer clients that have no key, and read what others have
    compressed.
    """

    def __init__(self, app: Any) -> None:
        from lenvm_vllm.settings import load_settings

        load_settings(
            served_config and served_config.additional_config
        )  # what is wrong is told now
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The first call is the lifespan's, before any request."""
        from lenvm_vllm.middleware import LengthTargetMiddleware

        router = scope["app"].router
        if not isinstance(router.middleware_stack, LengthTargetMiddleware):
            router.middleware_stack = LengthTargetMiddleware(router.middleware_stack)
        await self._app(scope, receive, send)


def warn_of_logprobs(device: str) -> None:
    """vLLM compiles a function for them, and its engine does not survive where that fails."""
    from lenvm_vllm.machine import COMPILE_OFF, compiles, has_compiler

    if device == "cpu" and compiles() and not has_compiler():
        logger.warning(
            "no C++ compiler here: a request with logprobs would end vLLM's engine; "
            "set %s=1, or install g++",
            COMPILE_OFF,
        )


def complete_names(names: list[Any] | None) -> list[Any] | None:
    """`lenvm_vllm` becomes `lenvm_vllm:LenvmLogitsProcessor`, once; other names stay."""
    if names is None:
        return None
    full = [PROCESSOR if name == BARE else name for name in names]
    return [name for i, name in enumerate(full) if name != PROCESSOR or i == full.index(PROCESSOR)]
