"""Lines of production logs, whatever wrote them, as one form.

    what a line holds                                    the request       the answers
    messages                                             the line          its last message, if an
                                                                           assistant's
    messages, choices                                    the line          the line
    request, response                                    request           response
    custom_id, response (OpenAI's batches, run-batch)    body of the line  response.body
                                                         of REQUESTS
    prompt_token_ids, token_ids                          the line, if it   the line, and its last
                                                         has messages      message as above

Answers of vLLM to `return_token_ids` bring prompt_token_ids and token_ids: then these are taken.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from trainer.rows import SHOWN, read_lines, row_of

TokenIds = list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]
ENDED = ("stop", "tool_calls", "function_call")
CUT = ("length", "content_filter", "abort", "repetition", "error")
Reason = Literal[
    "stop", "tool_calls", "function_call", "length", "content_filter", "abort", "repetition",
    "error",
]  # fmt: skip
FAILED, STEERED = "failed", "steered"  # lines that hold no answer of the model's own


class Part(msgspec.Struct):
    type: Literal["text"]
    text: str


class Function(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(msgspec.Struct, omit_defaults=True):
    function: Function
    id: str | None = None
    type: str = "function"


class Message(msgspec.Struct, omit_defaults=True):
    """Of OpenAI's chat; what else it has is left out."""

    role: str
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    def plain(self) -> dict[str, Any]:
        """As a chat template takes it: content a text, arguments of tools an object.

        Raises ValueError where arguments are none.
        """
        own: dict[str, Any] = msgspec.to_builtins(self)
        parts = own.get("content") or ""
        own["content"] = parts if isinstance(parts, str) else "\n".join(p["text"] for p in parts)
        for call in own.get("tool_calls", ()):
            given = call["function"].get("arguments", "")
            call["function"]["arguments"] = json_object(given) if isinstance(given, str) else given
        if reasoning := own.pop("reasoning", None):
            own.setdefault("reasoning_content", reasoning)
        return {name: value for name, value in own.items() if value is not None}


class Request(msgspec.Struct):
    messages: list[Message] = []
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    length_target: Any = None
    vllm_xargs: dict[str, Any] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None

    @property
    def is_steered(self) -> bool:
        """Whether the answer's end was not left to the model: by lenvm's plugin, or by vLLM."""
        ours = self.length_target, *(n for n in self.vllm_xargs or () if n.startswith("length_"))
        return any(own is not None for own in ours) or bool(self.min_tokens or self.ignore_eos)


class Choice(msgspec.Struct):
    message: Message | None = None
    token_ids: TokenIds | None = None
    prompt_token_ids: TokenIds | None = None
    finish_reason: Reason | None = None
    length_result: Any = None


class Usage(msgspec.Struct):
    completion_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None


class Completion(msgspec.Struct):
    choices: Annotated[list[Choice], msgspec.Meta(min_length=1)]
    id: str | int | None = None
    prompt_token_ids: TokenIds | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """message: None where only its ids are logged; token_ids, prompt_ids: empty where they are not.

    finish_reason: None where none is told; tokens: what the server counted, if it did; key: of
    this answer and no other, "" where it has none.
    """

    message: dict[str, Any] | None
    prompt_ids: list[int]
    token_ids: list[int]
    finish_reason: str | None
    tokens: int | None
    key: str


@dataclass(frozen=True, slots=True)
class Logged:
    """A line: messages before its answers, and these."""

    place: str
    domain: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    template_options: dict[str, Any]
    answers: list[Answer]


def lines_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """Where each line stands, and the line; those that are blank not."""
    return ((place, line) for place, line in read_lines(path) if line.strip())


def read_requests(path: Path) -> dict[str, Any]:
    """The bodies of a batch's input file by custom_id. Raises ValueError naming the line."""
    bodies: dict[str, Any] = {}
    for place, line in lines_of(path):
        row = row_of(place, line)
        name, body = row.get("custom_id"), row.get("body")
        if not isinstance(name, str) or name in bodies:
            raise bad(place, "custom_id", name, "a text that no other line has")
        if not isinstance(body, dict):
            raise bad(place, "body", body, "an object")
        bodies[name] = body
    return bodies


def parse(place: str, line: bytes, requests: Mapping[str, Any] | None) -> Logged | str:
    """What a line holds; FAILED or STEERED where it has no answer of the model's own.

    requests: see `read_requests`. Raises ValueError naming place, field and value.
    """
    row = row_of(place, line)
    request, answer, inside = _sides(place, row, requests)
    if request is None:
        return FAILED
    asked = _convert(place, request, Request, "request." if request is row.get("request") else "")
    completion = answer and _convert(place, answer, Completion, inside)
    choices = completion.choices if completion else []
    if asked.is_steered or any(choice.length_result is not None for choice in choices):
        return STEERED
    try:
        messages = [message.plain() for message in asked.messages]
        answers = _answers(completion) if completion else []
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    known = bool(answers) and all(a.prompt_ids and a.token_ids for a in answers)
    if asked.continue_final_message and not known:
        raise bad(place, "continue_final_message", True, "left out, or with token ids")
    alone = not inside and "choices" not in row and not asked.continue_final_message
    if alone and messages and messages[-1]["role"] == "assistant":
        last = messages.pop()
        answers = [replace(a, message=last) for a in answers] or [_last(place, row, last)]
    if not messages and not known:
        raise bad(
            place, "messages", asked.messages, "there (of a batch: by REQUESTS), or token ids"
        )
    for number, own in enumerate(answers):
        if own.message is None and not (own.prompt_ids and own.token_ids):
            raise bad(place, f"{inside}choices[{number}].message", None, "there without token ids")
    domain = row.get("domain") or ""
    if not isinstance(domain, str):
        raise bad(place, "domain", domain, "a text")
    options = asked.chat_template_kwargs or {}
    return Logged(place, domain, messages, asked.tools, options, answers)


def _sides(
    place: str, row: dict[str, Any], requests: Mapping[str, Any] | None
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, str]:
    """(request, answer, where the answer stands in the line); no request of one that failed."""
    if "custom_id" in row and "response" in row:
        response = row["response"] or {}
        body = response.get("body")
        if row.get("error") or response.get("status_code", 200) != 200 or not body:
            return None, None, ""
        name = row["custom_id"]
        if requests is None:
            return {}, body, "response.body."
        if name not in requests:
            raise bad(place, "custom_id", name, "one of those in the file of requests")
        return requests[name], body, "response.body."
    if "response" in row:
        return row.get("request", row), row["response"], "response."
    if "choices" in row:
        return row, row, ""
    if "token_ids" in row:
        usage = {"completion_tokens": None}
        own = {"prompt_token_ids": row.get("prompt_token_ids"), "id": row.get("id")}
        return row, {"choices": [row | {"message": None}], "usage": usage, **own}, ""
    return row, None, ""


def _answers(completion: Completion) -> list[Answer]:
    """Chats have the ids of the prompt at the top, answers of /v1/completions in each choice."""
    alone = len(completion.choices) == 1
    tokens = completion.usage.completion_tokens if completion.usage and alone else None
    return [
        Answer(
            choice.message.plain() | {"role": "assistant"} if choice.message else None,
            choice.prompt_token_ids or completion.prompt_token_ids or [],
            choice.token_ids or [],
            choice.finish_reason,
            tokens,
            f"{completion.id}/{number}" if completion.id else "",
        )
        for number, choice in enumerate(completion.choices)
    ]


def _last(place: str, row: Mapping[str, Any], message: dict[str, Any]) -> Answer:
    """The answer that ends a conversation; the line may tell how."""
    choice = _convert(place, {"finish_reason": row.get("finish_reason")}, Choice, "")
    usage = _convert(place, row.get("usage") or {}, Usage, "usage.")
    return Answer(message, [], [], choice.finish_reason, usage.completion_tokens, "")


def json_object(text: str) -> dict[str, Any]:
    """Raises ValueError where the arguments of a tool are none."""
    try:
        found = msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ValueError(f"tool_calls.function.arguments: {text[:SHOWN]!r}: {error}") from error
    return found


def bad(place: str, field: str, value: object, rule: str) -> ValueError:
    """What is wrong with a line."""
    return ValueError(f"{place}: {field}: {repr(value)[:SHOWN]}, must be {rule}")


def _convert(place: str, value: Any, kind: type, inside: str) -> Any:
    """Raises ValueError naming the field, from the outermost on, and its value."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        path = path.removesuffix("`")
        for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
            value = value[key] if key else value[int(index)]
        field = f"{inside}{path.lstrip('.')}".rstrip(".") or "the line"
        raise ValueError(f"{place}: {field}: {repr(value)[:SHOWN]}: {reason}") from error
