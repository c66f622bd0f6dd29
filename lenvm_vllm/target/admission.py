"""Whether a request can have the length that it asks for; asked before anything is generated.

Asked twice: by the middleware, whose answer is an HTTP 400 also for a stream, and on the way
into the engine, where the limits are known that vLLM itself filled in.
"""

from dataclasses import dataclass, replace
from typing import Any

from lenvm_vllm.settings import Settings, load_settings
from lenvm_vllm.steering.constants import LEAST
from lenvm_vllm.target.rails import Rails, bounds_of, needed_by
from lenvm_vllm.target.request import LengthTarget, LengthTargetError
from lenvm_vllm.text.parts import Markers, call_markers
from value_server.contract.units import UNITS


@dataclass(frozen=True)
class Limits:
    """What else a request says of its length, by vLLM's names; the defaults say nothing.

    max_name: the request's own name of max_tokens. min_tokens: before the end. shows_stop: whether
    what ends the text is shown in it.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    thinking_token_budget: int | None = None
    shows_stop: bool = False
    max_name: str = "max_tokens"

    @classmethod
    def of(cls, params: Any) -> "Limits":
        """Those of SamplingParams."""
        return cls(
            params.max_tokens,
            params.min_tokens,
            params.ignore_eos,
            params.thinking_token_budget,
            params.include_stop_str_in_output,
        )


def resolved(target: LengthTarget, config: Any) -> LengthTarget:
    """The target with the scope that it has where it names none: `answer` where the served model
    thinks, for a limit that counted the thinking could end inside it.

    config: the VllmConfig, None where it is not known. Raises LengthTargetError.
    """
    named = "scope" in target.model_fields_set or target.prefix_tokens
    if named or config is None or config.reasoning_config is None:
        return target
    if not markers_of(config, load_settings(config.additional_config)).think_end:
        return target
    for name in ("best_of", "endings"):
        if (getattr(target, name) or 1) > 1:
            raise LengthTargetError(
                f"length_target.{name}: {getattr(target, name)} needs scope 'completion'; this "
                "model reasons, so the default is 'answer'"
            )
    return target.model_copy(update={"scope": "answer"})


def only_prefills(config: Any) -> bool:
    """Whether this vLLM prepares answers for others to write: the prefill pod of a disaggregated
    pair, or the encoder of one. Of the one token that it writes nobody reads."""
    kv = getattr(config, "kv_transfer_config", None)
    ec = getattr(config, "ec_transfer_config", None)
    roles = getattr(kv, "kv_role", None), getattr(ec, "ec_role", None)
    return "kv_producer" in roles or "ec_producer" in roles


def check_admission(target: LengthTarget, limits: Limits, config: Any = None) -> None:
    """Raises LengthTargetError, which names what contradicts the target.

    config: the VllmConfig; None where it is not known yet, and asked about later.
    """
    target = resolved(target, config)
    if only_prefills(config):
        limits = replace(limits, max_tokens=None, min_tokens=0)
    if config is not None:
        check_engine(config)
    if target.scope != "completion":
        _check_markers(target, config)
        # vLLM's min_tokens counts the whole completion, so it contradicts no part of it.
        limits = replace(limits, min_tokens=0)
    whole = needed_by(target)
    _check_room(target, whole)
    _check_unit(target, limits, config)
    _check_prefix(target, whole)
    rails = whole.behind(target.prefix_tokens)
    _check_context(rails, config)
    check_limits(rails, limits)
    if target.scope == "thinking":
        _check_budget(rails, limits.thinking_token_budget)


def check_engine(config: Any) -> None:
    """Raises LengthTargetError where vLLM samples in a way that no target can be kept in."""
    if config.speculative_config is not None:
        # A row of a draft token belongs to a text that may never be; nothing guides it.
        raise LengthTargetError("length_target: not available with speculative decoding")
    if config.parallel_config.enable_batch_sharded_sampling:
        # Where the model cannot do it, all ranks sample all rows after all, and nothing tells the
        # plugin: ranks that each ask for values would go on with different tokens.
        raise LengthTargetError("length_target: not available with batch-sharded sampling")


def _check_markers(target: LengthTarget, config: Any) -> None:
    """Raises LengthTargetError for a part of a completion that nothing marks."""
    settings = load_settings(config and config.additional_config)
    if config is not None and not markers_of(config, settings).think_end:
        raise LengthTargetError(
            f"length_target.scope: {target.scope!r} needs to know the tokens that end the "
            "thinking: --reasoning-parser, or thinking_end_ids in the plugin's settings"
        )


def _check_prefix(target: LengthTarget, whole: Rails) -> None:
    """Raises LengthTargetError where nothing is left behind the prefix."""
    if whole.last is not None and target.prefix_tokens >= max(1, whole.last):
        raise LengthTargetError(
            f"length_target.prefix_tokens: {target.prefix_tokens} must be below the {whole.last} "
            "tokens of the completion"
        )


def _check_context(rails: Rails, config: Any) -> None:
    """Raises LengthTargetError for a text that no context has room for."""
    if config is not None and rails.first >= config.model_config.max_model_len:
        raise LengthTargetError(
            f"length_target: needs at least {rails.first} tokens; the context has "
            f"{config.model_config.max_model_len} for prompt and completion"
        )


def check_limits(rails: Rails, limits: Limits) -> None:
    """Raises LengthTargetError when the request's other fields contradict its rails."""
    if limits.ignore_eos:
        raise LengthTargetError("ignore_eos: true contradicts length_target")
    if limits.max_tokens is not None and limits.max_tokens < rails.first:
        raise LengthTargetError(
            f"{limits.max_name}: {limits.max_tokens} contradicts length_target, whose completion "
            f"has at least {rails.first} tokens"
        )
    if rails.last is not None and limits.min_tokens >= max(1, rails.last):
        raise LengthTargetError(
            f"min_tokens: {limits.min_tokens} tokens before the end contradict length_target, "
            f"whose completion has at most {rails.last} tokens, the end included"
        )


def _check_budget(rails: Rails, budget: int | None) -> None:
    """vLLM counts the tokens before the marker, and forces that whatever we say.

    Raises LengthTargetError.
    """
    if budget is not None and budget + 1 < rails.first:
        raise LengthTargetError(
            f"thinking_token_budget: {budget} tokens before the marker contradict length_target, "
            f"whose thinking has at least {rails.first} tokens, the marker included"
        )


def _check_room(target: LengthTarget, rails: Rails) -> None:
    """Raises LengthTargetError for a text that could only be empty."""
    most = target.limits[1] if rails.last is None else rails.last
    free = target.mode in ("tilt", "at_least") or target.unit != UNITS[0]
    if free or target.scope == "thinking" or most >= LEAST:
        return
    name = "max_tokens" if target.mode == "range" else "tokens"
    raise LengthTargetError(
        f"length_target.{name}: {target.limits[1]} is too short: at least {LEAST}, a token "
        "and the end"
    )


def _check_unit(target: LengthTarget, limits: Limits, config: Any) -> None:
    """Raises LengthTargetError where words or characters cannot be counted, or kept."""
    if target.unit == UNITS[0]:
        return
    name, given = f"length_target.{target.unit}", target.limits[1]
    if config is not None and config.model_config.skip_tokenizer_init:
        raise LengthTargetError(f"{name}: {given} needs a tokenizer, this vLLM has none")
    if limits.shows_stop:
        raise LengthTargetError(
            f"include_stop_str_in_output: true contradicts {name}, which does not count the stop"
        )
    if limits.min_tokens > 1 and bounds_of(target).last is not None:
        raise LengthTargetError(
            f"min_tokens: {limits.min_tokens} contradicts {name}, a limit in another unit; "
            f"mode 'range' takes min_{target.unit}"
        )


def markers_of(vllm_config: Any, settings: Settings, tokenizer: Any = None) -> Markers:
    """What divides the completions of the served model, as far as settings and vLLM know it.

    tokenizer: tells the markers of tool calls.
    """
    reasoning = vllm_config.reasoning_config
    end = settings.thinking_end_ids or (reasoning and reasoning.natural_reasoning_end_token_ids)
    start = reasoning and reasoning.reasoning_start_token_ids
    calls = {} if tokenizer is None else call_markers(tokenizer)
    return Markers(tuple(start or ()) if end else (), tuple(end or ()), calls)
