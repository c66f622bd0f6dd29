"""Streams of guided requests: now and then an event tells how far its text is, and the last one
how it ended.

vLLM writes server-sent events, a JSON object each; what a route calls its parts is told here.
"""

import json
import math
from collections.abc import Callable
from typing import Any

from lenvm_vllm.api.asgi import compact
from lenvm_vllm.api.outcome import RESULT
from lenvm_vllm.api.texts import Text, texts_of
from lenvm_vllm.telemetry.progress import Step
from value_server.contract.units import UNITS, count, tokens_per_unit

PROGRESS = "length_progress"

_END = b"\n\n"
_DATA = b"data: "


class Told:
    """An ASGI `send` of a stream.

    tell: puts the result into a text's own object. step: what the engine knows of the last of a
    text's tokens. every: tokens between two events that tell of it; 0: none does. unit: of the
    target. wants_ids: the client asked for token ids.
    """

    def __init__(
        self,
        send: Any,
        tell: Callable[[Text], None],
        step: Callable[[list[int]], Step | None],
        every: int,
        unit: str,
        wants_ids: bool,
    ) -> None:
        self._send = send
        self._tell = tell
        self._step = step
        self._every = every
        self._unit = unit
        self._wants_ids = wants_ids
        self._is_stream = False
        self._rest = b""
        self._ids: dict[int, list[int]] = {}  # of each choice
        self._texts: dict[int, str] = {}

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            kinds = [v for k, v in message["headers"] if k.lower() == b"content-type"]
            self._is_stream = bool(kinds) and kinds[0].startswith(b"text/event-stream")
        elif self._is_stream:
            message = {**message, "body": self._told(message)}
        await self._send(message)

    def _told(self, message: Any) -> bytes:
        """The events that are whole now."""
        *events, self._rest = (self._rest + message.get("body", b"")).split(_END)
        told = b"".join(map(self._event, events))
        return told if message.get("more_body", False) else told + self._rest

    def _event(self, raw: bytes) -> bytes:
        """An event and what ends it; nothing for one that vLLM sent for its token ids alone."""
        before, found, data = raw.rpartition(_DATA)
        if not found or not data.startswith(b"{"):
            return raw + _END
        chunk = json.loads(data)
        if "choices" in chunk:
            if not self._is_wanted(chunk):
                return b""
        elif chunk.get("type") == "content_block_delta":
            self._texts[0] = self._texts.get(0, "") + (chunk["delta"].get("text") or "")
            return raw + _END
        elif chunk.get("type") == "message_delta":
            self._end_message(chunk)
        elif chunk.get("type") == "response.completed":
            for text in texts_of(chunk["response"]):
                self._tell(text)
            if chunk["response"].get("status") == "incomplete":
                chunk["type"] = "response.incomplete"
                before = before.replace(b"response.completed", b"response.incomplete")
        else:
            return raw + _END
        return before + found + compact(chunk) + _END

    def _is_wanted(self, chunk: Any) -> bool:
        """Follow the choices of a chunk; False where it says nothing that the client asked for."""
        hollow = bool(chunk["choices"]) and not chunk.get("usage")
        for choice in chunk["choices"]:
            index = choice["index"]
            delta = choice.get("delta", choice)
            ids = self._ids.setdefault(index, [])
            before = len(ids)
            ids.extend(choice.get("token_ids") or ())
            text = self._texts.get(index, "") + (delta.get("content", delta.get("text")) or "")
            self._texts[index] = text
            if choice.get("finish_reason") is not None:
                limited = choice["finish_reason"] == "length"
                stopped = isinstance(choice.get("stop_reason"), str)
                self._tell(Text(choice, ids or None, len(ids) or None, text, limited, stopped))
            elif self._is_due(before, len(ids)) and (step := self._step(ids)) is not None:
                choice[PROGRESS] = progress_of(step, text, self._unit)
            hollow &= delta == {} and not choice.keys() & {RESULT, PROGRESS}
        if not self._wants_ids:
            hide_ids(chunk)
        return self._wants_ids or not hollow

    def _is_due(self, before: int, now: int) -> bool:
        """Whether a progress is, with so many tokens of a text before this chunk and now."""
        return self._every > 0 and before // self._every < now // self._every

    def _end_message(self, chunk: Any) -> None:
        delta = chunk["delta"]
        count = chunk["usage"]["output_tokens"]
        limited = delta.get("stop_reason") == "max_tokens"
        stopped = delta.get("stop_reason") == "stop_sequence"
        self._tell(Text(delta, None, count, self._texts.get(0, ""), limited, stopped))
        if RESULT in delta:
            chunk[RESULT] = delta.pop(RESULT)


def progress_of(step: Step, text: str, unit: str) -> dict[str, float | int | None]:
    """What a stream tells of a text so far: tokens, those that are expected still, and the
    probability of an end where its last one stands; None for what is not known. Of a target in
    another unit also its words or characters, and how many of them are expected still."""
    expected = round(step.expected, 1) if step.valued else None
    p_end = None if math.isnan(step.p_end) else round(step.p_end, 6)
    told = {"tokens": step.counted, "expected": expected, "p_end": p_end}
    if unit == UNITS[0]:
        return told
    amount = count(text, unit)
    ratio = tokens_per_unit(unit, step.counted, amount)
    rest = None if expected is None else round(expected / ratio, 1)
    return told | {unit: amount, f"expected_{unit}": rest}


def hide_ids(answer: dict[str, Any]) -> None:
    """Take back the token ids of an answer, or of a part of a stream, that nobody asked for."""
    for body in (answer, *answer.get("choices", ())):
        for name in ("token_ids", "prompt_token_ids"):
            if name in body:
                body[name] = None
