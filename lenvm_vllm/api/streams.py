"""Streams of guided requests: now and then an event tells how far its text is, and the last one
how it ended.

vLLM writes server-sent events, a JSON object each; what a route calls its parts is told here.
"""

import json
from typing import Any

from lenvm_vllm.api.asgi import compact
from lenvm_vllm.api.outcome import PROGRESS, RESULT, Report
from lenvm_vllm.api.texts import Text, of_message, texts_of

_END = b"\n\n"
_DATA = b"data: "


class Stream:
    """An ASGI `send` of a stream. wants_ids: the client asked for token ids."""

    def __init__(self, send: Any, report: Report, wants_ids: bool) -> None:
        self._send = send
        self._report = report
        self._every = report.target.progress
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
            message = {**message, "body": await self._told(message)}
        await self._send(message)

    async def _told(self, message: Any) -> bytes:
        """The events that are whole now."""
        *events, self._rest = (self._rest + message.get("body", b"")).split(_END)
        told = b"".join([await self._event(event) for event in events])
        return told if message.get("more_body", False) else told + self._left() + self._rest

    def _left(self) -> bytes:
        """Events that were not told yet, where nothing more comes."""
        return b""

    async def _event(self, raw: bytes) -> bytes:
        """An event and what ends it; nothing for one that vLLM sent for its token ids alone."""
        before, found, data = raw.partition(_DATA)  # a text may have it, too
        if not found or not data.startswith(b"{"):
            return raw + _END
        chunk = json.loads(data)
        kind = chunk.get("type")
        if "choices" in chunk:
            if not await self._is_wanted(chunk):
                return b""
        elif kind == "message_delta":
            self._end_message(chunk)
        elif kind == "response.completed":
            if self._end_response(chunk):
                before = before.replace(b"response.completed", b"response.incomplete")
        else:
            if kind == "content_block_delta":
                self._texts[0] = self._texts.get(0, "") + (chunk["delta"].get("text") or "")
            return raw + _END
        return before + found + compact(chunk) + _END

    async def _is_wanted(self, chunk: Any) -> bool:
        """Follow the choices of a chunk; False where it says nothing that the client asked for."""
        for choice in chunk["choices"]:
            await self._follow(choice)
        if self._wants_ids:
            return True
        hide_ids(chunk)
        says_nothing = bool(chunk["choices"]) and not chunk.get("usage")
        return not says_nothing or not all(map(_is_hollow, chunk["choices"]))

    async def _follow(self, choice: Any) -> None:
        """Put into a choice how far its text is, or how it ended."""
        index, delta = choice["index"], choice.get("delta", choice)
        ids = self._ids.setdefault(index, [])
        before = len(ids)
        ids.extend(choice.get("token_ids") or ())
        text = self._texts.get(index, "") + (delta.get("content", delta.get("text")) or "")
        self._texts[index] = text
        if choice.get("finish_reason") is not None:
            limited = choice["finish_reason"] == "length"
            stopped = isinstance(choice.get("stop_reason"), str)
            await self._finish(Text(choice, ids or None, len(ids) or None, text, limited, stopped))
            return
        is_due = self._every > 0 and before // self._every < len(ids) // self._every
        if is_due and (progress := self._report.progress(ids, text)) is not None:
            choice[PROGRESS] = progress

    def _end_message(self, chunk: Any) -> None:
        """Of `/v1/messages`; RESULT stands beside the delta that says why the text ended."""
        delta = chunk["delta"]
        self._end(of_message(delta, chunk["usage"], self._texts.get(0, "")))
        chunk[RESULT] = delta.pop(RESULT)

    def _end_response(self, chunk: Any) -> bool:
        """Of `/v1/responses`; whether a limit ended it."""
        for text in texts_of(chunk["response"]):
            self._end(text)
        if incomplete := chunk["response"].get("status") == "incomplete":
            chunk["type"] = "response.incomplete"
        return incomplete

    async def _finish(self, text: Text) -> None:
        """The last chunk of a choice has come."""
        self._end(text)

    def _end(self, text: Text) -> None:
        self._report.put(text, self._report.outcome(text))


def _is_hollow(choice: Any) -> bool:
    says = choice.get("logprobs") or choice.keys() & {RESULT, PROGRESS}
    return choice.get("delta", choice) == {} and not says


def hide_ids(answer: dict[str, Any]) -> None:
    """Take back the token ids of an answer, or of a part of a stream, that nobody asked for."""
    for body in (answer, *answer.get("choices", ())):
        for name in ("token_ids", "prompt_token_ids"):
            if name in body:
                body[name] = None
