"""The texts of an answer, in whichever form its route has.

A chat or a text completion has choices, `/v1/responses` an object of its own and `/v1/messages`
another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_CALLS = {"tool_calls", "tool_use"}  # why a text ended, of OpenAI and of Anthropic


@dataclass
class Text:
    """One text of an answer. body: the object of the answer that is about it.
    ids: its tokens, None where the route does not tell them; count: how many, None likewise.
    limited: cut by `max_tokens` or the context's end. stopped: by a stop string."""

    body: dict[str, Any]
    ids: list[int] | None
    count: int | None
    text: str
    limited: bool
    stopped: bool

    def call_cut(self) -> None:
        """Say, in the words of its route, that a limit ended it. Not of one with a call, which is
        whole and would not be made."""
        if {self.body.get("finish_reason"), self.body.get("stop_reason")} & _CALLS:
            return
        if "finish_reason" in self.body:
            self.body["finish_reason"] = "length"
        elif "stop_reason" in self.body:
            self.body["stop_reason"] = "max_tokens"
        else:
            self.body["status"] = "incomplete"
            self.body["incomplete_details"] = {"reason": "max_output_tokens"}


def texts_of(answer: dict[str, Any]) -> Iterator[Text]:
    """Of any route that can be guided."""
    if "choices" in answer:
        yield from map(_of_choice, answer["choices"])
    elif answer.get("type") == "message":
        content = "".join(block.get("text") or "" for block in answer.get("content") or ())
        yield of_message(answer, answer["usage"], content)
    elif answer.get("object") == "response" and answer.get("usage"):
        parts = [part for item in answer.get("output") or () for part in item.get("content") or ()]
        said = (part.get("text") for part in parts if part.get("type") == "output_text")
        content = "".join(text or "" for text in said)  # and not what was thought
        limited = answer.get("status") != "completed"
        yield Text(answer, None, answer["usage"]["output_tokens"], content, limited, False)


def of_message(body: dict[str, Any], usage: dict[str, Any], text: str) -> Text:
    """Of `/v1/messages`. body: has its `stop_reason`."""
    reason = body.get("stop_reason")
    limited, stopped = reason == "max_tokens", reason == "stop_sequence"
    return Text(body, None, usage["output_tokens"], text, limited, stopped)


def _of_choice(choice: dict[str, Any]) -> Text:
    content = choice["message"].get("content") if "message" in choice else choice.get("text")
    ids = choice.get("token_ids")
    return Text(
        body=choice,
        ids=ids,
        count=len(ids) if ids else None,
        text=content or "",
        limited=choice.get("finish_reason") == "length",
        stopped=isinstance(choice.get("stop_reason"), str),
    )
