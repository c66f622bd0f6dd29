"""What the plugin changes in vLLM; the names it leans on stand in `vllm_names`.

vLLM runs `register` in each of its processes before it reads its arguments. Where the operator
wrote `--logits-processors lenvm_vllm` it completes the bare name, and adds the middleware for
the request field through vLLM's own `--middleware`.
"""

import functools
from typing import Any

BARE = "lenvm_vllm"
PROCESSOR = "lenvm_vllm:LenvmLogitsProcessor"
MIDDLEWARE = "lenvm_vllm.middleware.LengthTargetMiddleware"

# The VllmConfig of this process's API server, for its middleware. Several models in one process
# (the offline `LLM` class) have no API server: each request brings the configuration of its own.
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
        if _is_loaded(self.logits_processors):
            watch_intake()
        return served_config

    EngineArgs.from_cli_args = classmethod(with_middleware)
    EngineArgs.create_engine_config = with_full_names


def watch_intake() -> None:
    """Each request of an engine with the plugin passes `intake.take_in`. Idempotent."""
    from lenvm_vllm.intake import take_in
    from lenvm_vllm.vllm_names import InputProcessor

    process_inputs = InputProcessor.process_inputs
    if hasattr(process_inputs, "_lenvm"):
        return

    @functools.wraps(process_inputs)
    def with_targets(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        if _is_loaded(self.vllm_config.model_config.logits_processors):
            take_in(self.vllm_config, request)
        return request

    with_targets._lenvm = True  # type: ignore[attr-defined]
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
