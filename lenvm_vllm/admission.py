"""Whether a request can have the length that it asks for; asked before anything is generated.

Asked twice: by the middleware, whose answer is an HTTP 400 also for a stream, and by vLLM's
`validate_params`, which knows the limits that vLLM itself filled in.
"""

from typing import Any

from lenvm_vllm import vllm_hooks
from lenvm_vllm.rails import check_limits, rails_of
from lenvm_vllm.request import LengthTarget, LengthTargetError
from lenvm_vllm.settings import Settings, load_settings


def check_admission(
    target: LengthTarget,
    max_tokens: int | None,
    min_tokens: int,
    ignore_eos: bool,
    thinking_token_budget: int | None = None,
) -> None:
    """The limits are those of the request itself. Raises LengthTargetError."""
    config = vllm_hooks.served_config
    if vllm_hooks.only_prefills():
        max_tokens, min_tokens = None, 0
    if config is not None and config.speculative_config is not None:
        # A row of a draft token belongs to a text that may never be; nothing guides it.
        raise LengthTargetError("length_target: not available with speculative decoding")
    if target.scope != "completion":
        # vLLM's min_tokens counts the whole completion, so it contradicts no part of it.
        min_tokens = 0
        settings = load_settings(config and config.additional_config)
        if config is not None and not marker_ids_of(config, settings):
            raise LengthTargetError(
                f"length_target.scope: {target.scope!r} needs to know the token that ends the "
                "thinking: --reasoning-parser, or thinking_end_ids in the plugin's settings"
            )
    whole = rails_of(target)
    if whole.last is not None and target.prefix_tokens >= whole.last:
        raise LengthTargetError(
            f"length_target.prefix_tokens: {target.prefix_tokens} leave no token of a completion "
            f"that has at most {whole.last}"
        )
    rails = whole.behind(target.prefix_tokens)
    if config is not None and rails.first >= config.model_config.max_model_len:
        raise LengthTargetError(
            f"length_target: {rails.first} tokens at least, prompt and completion together have "
            f"{config.model_config.max_model_len}"
        )
    check_limits(rails, max_tokens, min_tokens, ignore_eos)
    # vLLM's budget counts the tokens before the marker, and forces that whatever we say.
    budget = thinking_token_budget if target.scope == "thinking" else None
    if budget is not None and budget + 1 < rails.first:
        raise LengthTargetError(
            f"thinking_token_budget: {budget} tokens before the marker contradict length_target, "
            f"whose thinking has at least {rails.first} tokens, the marker included"
        )


def marker_ids_of(vllm_config: Any, settings: Settings) -> list[int]:
    """Tokens that end a thinking; none where neither the settings nor vLLM know a single one."""
    if settings.thinking_end_ids:
        return list(settings.thinking_end_ids)
    reasoning = vllm_config.reasoning_config
    ids = (reasoning and reasoning.natural_reasoning_end_token_ids) or []
    return list(ids) if len(ids) == 1 else []
