"""The texts of an answer, in whichever form its route has.

A chat or a text completion has choices, `/v1/responses` an object of its own and `/v1/messages`
another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lenvm_vllm.api.outcome import Outcome
from lenvm_vllm.telemetry.progress import Known


@dataclass
class Text:
    """One text of an answer. body: the object of the answer that is about it.
    ids: its tokens, None where the route does not tell them; count: how many, None likewise."""

    body: dict[str, Any]
    ids: list[int] | None
    count: int | None
    text: str
    limited: bool
    stopped: bool

    def outcome(self, known: Known, key: str) -> Outcome:
        """key: of the request, by which the engine knows it."""
        step = known.step(key, self.ids, self.count)
        length = self.count or (step.counted if step else 0)
        return Outcome(length, self.text, self.limited, self.stopped, step)

    def call_cut(self) -> None:
        """Say, in the words of its route, that a limit ended it."""
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
        for choice in answer["choices"]:
            yield _of_choice(choice)
    elif answer.get("type") == "message":
        content = "".join(block.get("text") or "" for block in answer.get("content") or ())
        count = answer["usage"]["output_tokens"]
        limited = answer.get("stop_reason") == "max_tokens"
        stopped = answer.get("stop_reason") == "stop_sequence"
        yield Text(answer, None, count, content, limited, stopped)
    elif answer.get("object") == "response" and answer.get("usage"):
        parts = [part for item in answer.get("output") or () for part in item.get("content") or ()]
        content = "".join(part.get("text") or "" for part in parts)
        limited = answer.get("status") != "completed"
        yield Text(answer, None, answer["usage"]["output_tokens"], content, limited, False)


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
