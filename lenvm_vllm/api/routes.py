"""The routes of vLLM on which a length target is taken, and where it goes there.

A test walks over the routes of vLLM's own application: one that writes text is here.
"""

from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lenvm_vllm.target.request import number

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"  # Anthropic's form
BATCH = f"{CHAT}/batch"
INVOCATIONS = "/invocations"  # SageMaker's name for a chat or a text completion
GENERATE = "/inference/v1/generate"  # token ids in, token ids out

_OF_CHAT = ("max_completion_tokens", "max_tokens")
_OF_RESPONSES = ("max_output_tokens",)
_TEXT_LIMIT = 16  # of a text completion that sets none, since OpenAI's first


@dataclass(frozen=True)
class Route:
    """A kind of request.

    params: its part that holds the sampling parameters; None: the request itself.
    xargs: name there of what reaches the engine's plugins.
    choices: whether several answers, or endings of one, may be sampled for one that is returned.
    ranked: whether its requests have a priority.
    writes: whether a text is written here.
    tells: whether its answers have a form in which they can tell of their length.
    refusal: why no length can be asked for; empty where it can.
    limits: its fields for the most tokens of an answer; the first one that is set counts.
    limit: the most tokens of a request that sets no limit; None: the model's context.
    """

    params: str | None = None
    xargs: str = "vllm_xargs"
    choices: bool = False
    ranked: bool = True
    writes: bool = True
    tells: bool = True
    refusal: str = ""
    limits: tuple[str, ...] = ("max_tokens",)
    limit: int | None = None

    @property
    def holder(self) -> str:
        """Path of what reaches the engine's plugins."""
        return f"{self.params}.{self.xargs}" if self.params else self.xargs

    def params_of(self, request: dict[str, Any]) -> dict[str, Any]:
        """The sampling parameters: the object itself, to read and to change."""
        params = request if self.params is None else request.get(self.params)
        return params if isinstance(params, dict) else {}

    def limit_of(self, request: dict[str, Any]) -> int | None:
        """The most tokens that the answer may have; None where only the model's context ends it."""
        params, name = self.params_of(request), self.limit_name(request)
        return self.limit if params.get(name) is None else whole(params, name)

    def limit_name(self, request: dict[str, Any]) -> str:
        """The field that counts of `limits`; the last one where none is set."""
        params = self.params_of(request)
        return next((n for n in self.limits if params.get(n) is not None), self.limits[-1])


def whole(params: dict[str, Any], name: str) -> int | None:
    """A number of the request, as vLLM reads it; None for anything else, which is left to it."""
    return value if type(value := number(params.get(name))) is int else None


_FLAG = TypeAdapter(bool)


def streams(request: dict[str, Any]) -> bool:
    """Whether its answer is a stream, as vLLM reads that; what it refuses is none."""
    try:
        return _FLAG.validate_python(request.get("stream") or False)
    except ValidationError:
        return False


_CHAT = Route(choices=True, limits=_OF_CHAT)
_TEXT = Route(choices=True, limit=_TEXT_LIMIT)
_PREPARED = Route(writes=False, tells=False, ranked=False)
_SCORES = Route(writes=False, refusal="it writes no text")
_COHERE = Route(refusal="vLLM passes no extra parameters on from this route")

ROUTES = {
    CHAT: _CHAT,
    TEXT: _TEXT,
    BATCH: Route(limits=_OF_CHAT),
    RESPONSES: Route(limits=_OF_RESPONSES),
    MESSAGES: Route(ranked=False),
    GENERATE: Route(params="sampling_params", xargs="extra_args", tells=False),
    # They make requests for GENERATE of the others.
    f"{CHAT}/render": replace(_PREPARED, limits=_OF_CHAT),
    f"{TEXT}/render": replace(_PREPARED, limit=_TEXT_LIMIT),
    f"{RESPONSES}/render": replace(_PREPARED, limits=_OF_RESPONSES),
    f"{MESSAGES}/render": _PREPARED,
    "/generative_scoring": _SCORES,
    "/v1/systemone": _SCORES,
    "/v1/decisions": Route(writes=False, ranked=False, refusal="it writes no text"),  # of 0.33
    "/cohere/v2/chat": _COHERE,
    "/cohere/v2/chat/render": _COHERE,
}
PATHS = (*ROUTES, INVOCATIONS)
# These take a form with a recording, and their text has the length of what was said.
RECORDINGS = ("/v1/audio/transcriptions", "/v1/audio/translations")


def route_at(path: str, request: dict[str, Any]) -> Route:
    """The route of a request to one of PATHS."""
    if path == INVOCATIONS:
        return _CHAT if "messages" in request else _TEXT
    return ROUTES[path]
