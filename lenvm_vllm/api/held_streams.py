"""Streams whose last tokens are held back until it is known whether they end well.

    sampled   |=====================================|
    sent      |=========================|            the last HOLD tokens may yet be others

The text does not stop for that: on its way to where it may end, every other token goes out.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from lenvm_vllm.api.answers import log_chosen
from lenvm_vllm.api.continuation import Draft
from lenvm_vllm.api.outcome import Report
from lenvm_vllm.api.streams import Stream
from lenvm_vllm.api.texts import Text
from lenvm_vllm.steering.constants import SENTENCE
from lenvm_vllm.steering.landing import Landing
from value_server.contract.units import CHARACTERS, OUT, UNITS, follow_words, tokens_per_unit

HOLD = SENTENCE  # tokens that another ending may replace


class Pace:
    """How much of a text may be sent while it grows.

    landing: in the target's unit.
    """

    def __init__(self, landing: Landing[float], unit: str) -> None:
        self._landing, self._unit = landing, unit
        self._amount, self._place = 0, OUT  # of the text so far, as of `follow_words`
        self._free = 0

    def free(self, tokens: int, more: str) -> int:
        """Tokens that may be sent of a text of so many, which has grown by `more`.

        All far before the landing, all but HOLD in it. Where it has passed its target, no more
        until 2 HOLD are held: other endings begin before the target, if that is not far behind.
        """
        amount, ratio = self._follow(tokens, more), 1.0
        if self._unit != UNITS[0]:
            ratio = tokens_per_unit(self._unit, tokens, self._amount)
        if amount <= self._landing.target:
            near = 2 * HOLD + (amount - self._landing.opens) * ratio
            self._free = max(self._free, tokens - int(min(HOLD, max(0.0, near / 2))))
        self._free = max(self._free, tokens - 2 * HOLD)
        return self._free

    def _follow(self, tokens: int, more: str) -> int:
        if self._unit == UNITS[0]:
            return tokens
        if self._unit == CHARACTERS:
            self._amount += len(more)
        else:
            words, self._place = follow_words(more, self._place)
            self._amount += words
        return self._amount


class HeldStream(Stream):
    """A stream of one choice.

    paced: what may be sent of it, by how many tokens its prompt has. improve: gives the whole text
    another ending where it needs one, and is awaited while the stream stands still.
    """

    def __init__(
        self,
        send: Any,
        report: Report,
        wants_ids: bool,
        paced: Callable[[int], Pace],
        improve: Callable[[Draft], Awaitable[None]],
        tokenizer: Any,
    ) -> None:
        super().__init__(send, report, wants_ids)
        self._paced, self._improve, self._tokenizer = paced, improve, tokenizer
        self._pace: Pace | None = None
        self._name: str | None = None
        self._prompt_ids: list[int] = []
        self._held: deque[tuple[int, int, bytes]] = deque()  # tokens and characters up to its end
        self._kept = 0, 0  # the same of what was sent
        self._grows = False  # the event is a part of the text, and not the last one
        self._is_other = False  # another ending was chosen

    async def flush(self) -> None:
        """Send what is held, where vLLM failed."""
        if held := self._left():
            await self._send({"type": "http.response.body", "body": held, "more_body": True})

    def _left(self) -> bytes:
        held = b"".join(event for _, _, event in self._held)
        self._held.clear()
        return held

    async def _event(self, raw: bytes) -> bytes:
        if raw.startswith(b":"):  # a comment that keeps the connection
            return await super()._event(raw)
        self._grows, before = False, len(self._texts.get(0, ""))
        event = await super()._event(raw)
        tokens, text = len(self._ids.get(0, ())), self._texts.get(0, "")
        self._held.append((tokens, len(text), event))
        if self._pace is None:  # the first chunk tells the prompt
            self._pace = self._paced(len(self._prompt_ids))
        free = self._pace.free(tokens, text[before:])
        told = []
        while self._held and (not self._grows or self._held[0][0] <= free):
            tokens, characters, event = self._held.popleft()
            self._kept = tokens, characters
            told.append(event)
        return b"".join(told)

    async def _is_wanted(self, chunk: Any) -> bool:
        self._name = chunk.get("id")
        for body in (chunk, *chunk["choices"]):
            self._prompt_ids = self._prompt_ids or body.get("prompt_token_ids") or []
        self._grows = any(choice.get("finish_reason") is None for choice in chunk["choices"])
        wanted = await super()._is_wanted(chunk)
        if self._is_other and (usage := chunk.get("usage")):
            usage["completion_tokens"] = len(self._ids[0])
            usage["total_tokens"] = usage["prompt_tokens"] + len(self._ids[0])
        return wanted

    async def _finish(self, text: Text) -> None:
        draft = self._draft(text)
        await self._improve(draft)
        if draft.ids != (text.ids or []):
            self._end_with(draft, text.body)
        self._report.put(text, draft.outcome, draft.sampled, draft.endings)
        if draft.endings > 1:
            log_chosen(self._name, draft.endings, draft.outcome.text)

    def _draft(self, text: Text) -> Draft:
        """The text as one answer; what was sent of it stays."""
        choice = {"text": text.text, "token_ids": text.ids, "prompt_token_ids": self._prompt_ids}
        choice["finish_reason"] = text.body["finish_reason"]
        usage = {"prompt_tokens": len(self._prompt_ids)}
        draft = Draft(
            {"choices": [choice], "usage": usage}, self._report.outcome(text), self._tokenizer
        )
        tokens, characters = self._kept
        draft.streamed, draft.kept, draft.kept_text = True, tokens, text.text[:characters]
        return draft

    def _end_with(self, draft: Draft, choice: Any) -> None:
        """The last chunk has the rest of the text, in place of what is held."""
        tokens, characters = self._kept
        rest = draft.outcome.text[characters:]
        if "delta" in choice:
            choice["delta"]["content"] = rest
        else:
            choice["text"] = rest
        choice["token_ids"] = draft.ids[tokens:]
        choice["finish_reason"] = draft.finish_reason
        if "stop_reason" in choice:
            choice["stop_reason"] = None
        self._ids[0], self._is_other = draft.ids, True
        self._held.clear()
