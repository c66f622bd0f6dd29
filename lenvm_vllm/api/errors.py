"""What a 400 says, as far as the route and the fields beside `length_target` are to blame.

Each check raises LengthTargetError, whose message names field and value. What is wrong in the
length itself is said in `target/request.py`, and what its numbers contradict in
`target/admission.py`.
"""

import json
from typing import Any

from lenvm_vllm.api.asgi import send_whole
from lenvm_vllm.api.routes import CHAT, MESSAGES, TEXT, Route
from lenvm_vllm.target.misplaced import FIELD, is_meant, misplaced
from lenvm_vllm.target.request import LengthTargetError, number


async def refuse(send: Any, message: str, path: str) -> None:
    """HTTP 400 in the form of OpenAI, or of Anthropic, which has a type around it."""
    error = {"message": message, "type": "BadRequestError", "param": FIELD, "code": 400}
    around = {"type": "error"} if path == MESSAGES else {}
    body = json.dumps(around | {"error": error}).encode()
    await send_whole(send, 400, {"content-type": "application/json"}, body)


def refuse_recording(name: str) -> None:
    """Raises what vLLM answers with HTTP 400."""
    from starlette.exceptions import HTTPException  # vLLM brings it

    raise HTTPException(400, f"{name}: {FIELD} is not available for recordings")


def check_names(request: dict[str, Any], route: Route) -> None:
    """For a name or a place that vLLM would silently ignore."""
    slips = [(name, value) for name, value in request.items() if name != FIELD and is_meant(name)]
    for name, value in (*slips, *misplaced(request, route.holder)):
        raise LengthTargetError(
            f"{name}: unknown field, got {value!r}; put the length into {FIELD} at the top level "
            "of the body"
        )


def check_xargs(xargs: Any, route: Route) -> None:
    """For what stands where the field goes to."""
    if not isinstance(xargs, dict):
        raise LengthTargetError(f"{route.holder}: expected an object, got {xargs!r}")
    for key in filter(is_meant, xargs):
        raise LengthTargetError(f"{FIELD}: also given as {route.holder}.{key}; give it once")


def check_beside(request: dict[str, Any], best_of: int, route: Route, path: str) -> None:
    """For a route where no length can be asked for, and fields that contradict one."""
    if route.refusal:
        raise LengthTargetError(f"{FIELD}: not on {path}: {route.refusal}")
    if request.get("use_beam_search"):
        # vLLM searches beams without any logits processor: the target would be lost silently.
        raise LengthTargetError(f"use_beam_search: true contradicts {FIELD}")
    if request.get("prompt_embeds"):
        raise LengthTargetError(f"prompt_embeds: not supported with {FIELD}, which needs token ids")
    if best_of > 1:
        _check_best_of(f"{FIELD}.best_of: {best_of}", request, best_of, route)


def _check_best_of(name: str, request: dict[str, Any], best_of: int, route: Route) -> None:
    """For several whole answers where the client could not get the best of them."""
    if not route.choices:
        raise LengthTargetError(f"{name}: only {CHAT} and {TEXT} choose among answers")
    for other in ("stream", "echo"):
        if request.get(other):
            raise LengthTargetError(f"{name} contradicts {other}: {request[other]!r}")
    if number(request.get("temperature")) == 0:
        raise LengthTargetError(f"{name} contradicts temperature: 0, at which all would be alike")
    n = request.get("n")
    if n is not None and not (type(n) is int and 1 <= n <= best_of):
        raise LengthTargetError(f"n: {n!r}, must be from 1 to {name}")


def check_prefix(prefix: int, prompt: int) -> None:
    """For a prompt that has fewer tokens than are to count as the completion's."""
    if prefix > prompt:
        raise LengthTargetError(
            f"{FIELD}.prefix_tokens: {prefix}, of a prompt that has {prompt} tokens"
        )


def check_context(least: int, prompt: int, room: int) -> None:
    """For a prompt behind which the fewest tokens of the text have no room."""
    if least > room:
        raise LengthTargetError(
            f"{FIELD}: needs at least {least} tokens; a prompt of {prompt} leaves {room}"
        )
