"""Everything that touches vLLM's inside, for vLLM 0.32.

vLLM runs `register` in each of its processes before it reads its arguments. Where the operator
wrote `--logits-processors lenvm_vllm` it completes the bare name, and adds the middleware for
the request field through vLLM's own `--middleware`.
"""

import functools
from typing import Any

BARE = "lenvm_vllm"
PROCESSOR = "lenvm_vllm:LenvmLogitsProcessor"
MIDDLEWARE = "lenvm_vllm.middleware.LengthTargetMiddleware"


def register() -> None:
    """Idempotent; loads nothing of the plugin but this file."""
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, "_lenvm_registered", False):
        return
    EngineArgs._lenvm_registered = True
    from_cli_args = EngineArgs.from_cli_args.__func__
    create_model_config = EngineArgs.create_model_config

    @functools.wraps(from_cli_args)
    def with_middleware(cls: type, args: Any) -> Any:
        args.logits_processors = complete_names(getattr(args, "logits_processors", None))
        middleware = getattr(args, "middleware", None)
        named = PROCESSOR in (args.logits_processors or ())
        if named and middleware is not None and MIDDLEWARE not in middleware:
            args.middleware = [*middleware, MIDDLEWARE]
        return from_cli_args(cls, args)

    @functools.wraps(create_model_config)
    def with_full_names(self: Any) -> Any:
        self.logits_processors = complete_names(self.logits_processors)
        return create_model_config(self)

    EngineArgs.from_cli_args = classmethod(with_middleware)
    EngineArgs.create_model_config = with_full_names


def complete_names(names: list[Any] | None) -> list[Any] | None:
    """`lenvm_vllm` becomes `lenvm_vllm:LenvmLogitsProcessor`, once; other names stay."""
    if names is None:
        return None
    full = [PROCESSOR if name == BARE else name for name in names]
    return [name for i, name in enumerate(full) if name != PROCESSOR or i == full.index(PROCESSOR)]
