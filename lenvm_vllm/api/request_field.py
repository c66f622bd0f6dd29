"""The field `length_target` of a request, read and moved to where the plugins of vLLM find it."""

from collections.abc import Mapping
from typing import Any

from lenvm_vllm.api import errors, hint
from lenvm_vllm.api.routes import Route, whole
from lenvm_vllm.host import served
from lenvm_vllm.target.admission import Limits, check_admission, only_prefills, resolved
from lenvm_vllm.target.request import FIELD, HAS_CALLS, REQUEST_ID, LengthTarget, is_prefill


def take(
    request: dict[str, Any], route: Route, path: str, request_id: str | None = None
) -> LengthTarget | None:
    """The length target of a request, moved in it to the route's place for plugins.

    None also where this engine only prefills for another. request_id: goes along, for the logs
    of the value server. Raises LengthTargetError.
    """
    errors.check_names(request, route)
    params = route.params_of(request)
    xargs = params.get(route.xargs) or {}
    given = request.pop(FIELD, None)
    if given is None:
        target = LengthTarget.from_extra_args(xargs) if isinstance(xargs, dict) else None
        if target is None:
            return None
        target = resolved(target, served.config)
    else:
        target = resolved(LengthTarget.parse(given), served.config)
        errors.check_xargs(xargs, route)
        known = {REQUEST_ID: request_id} if request_id else {}
        params[route.xargs] = {**xargs, **known, **target.to_xargs()}
        target = hint.say(request, target, served.config)
    errors.check_beside(request, target.best_of, route, path)
    _check_limits(target, request, route)
    if request.get("tools") and request.get("tool_choice") not in ("none", {"type": "none"}):
        params[route.xargs] = {**params[route.xargs], HAS_CALLS: 1}
    return None if prefills(request) else target


def prefills(request: Mapping[str, Any]) -> bool:
    """Whether another engine writes the answer, and the one token of this one is thrown away."""
    return is_prefill(request) or only_prefills(served.config)


def _check_limits(target: LengthTarget, request: dict[str, Any], route: Route) -> None:
    """Raises LengthTargetError."""
    params, prefill = route.params_of(request), prefills(request)
    limits = Limits(
        max_tokens=None if prefill else route.limit_of(request),
        max_name=route.limit_name(request),
        min_tokens=0 if prefill else whole(params, "min_tokens") or 0,
        ignore_eos=params.get("ignore_eos") is True,
        thinking_token_budget=whole(params, "thinking_token_budget"),
        shows_stop=params.get("include_stop_str_in_output") is True,
    )
    check_admission(target, limits, served.config)
