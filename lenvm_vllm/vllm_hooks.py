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
MIDDLEWARE = "lenvm_vllm.middleware.LengthTargetMiddleware"

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
