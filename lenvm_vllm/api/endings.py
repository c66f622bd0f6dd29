"""Other endings: an answer that does not end well is written again from shortly before its end.

Only the way that a text ends tells whether its length was meant, so only that is sampled anew:
vLLM has the text before it in its prefix cache, and the value server in its own
(`continuation.py`).

Of a stream the last tokens are held back for that (`held_streams.py`).

They cost work, so none begins where it cannot help: a text that steering had no part in, values
that are missing, a vLLM whose requests wait. And they are bounded, so that nobody waits for them
longer than for the answer itself.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from lenvm_vllm.api.answers import Answers, Sampled, keyed
from lenvm_vllm.api.asgi import Upstream
from lenvm_vllm.api.continuation import Draft, continuation, for_text
from lenvm_vllm.api.held_streams import HeldStream, Pace
from lenvm_vllm.api.outcome import ENDS, Outcome, Report
from lenvm_vllm.api.rounds import Round
from lenvm_vllm.api.texts import texts_of
from lenvm_vllm.steering.constants import SENTENCE
from lenvm_vllm.target.rails import landing_before, width_of
from lenvm_vllm.telemetry.metrics import Counters
from value_server.contract.units import UNITS

logger = logging.getLogger("vllm.lenvm")

ROUND = 4  # endings that are sampled side by side
TAIL = 2 * SENTENCE  # tokens before the end from which the first of them begin
_CUT = ENDS.index("cut")


@dataclass(frozen=True)
class Bounds:
    """What the endings of all requests of an API server process share.

    rounds: how many rounds may run at a time. patience: how long a request may look for endings,
    in times of what its first answer took. pause: seconds for which a stream may stop for them.
    waiting: requests that wait in vLLM's queue.
    """

    rounds: asyncio.Semaphore
    patience: float
    pause: float
    waiting: Callable[[], float]
    counters: Counters = field(default_factory=Counters)


@dataclass(frozen=True, kw_only=True)
class Endings(Answers):
    """The answer with the best of up to `endings` endings.

    More are sampled, ROUND at a time, only until one is good; those of a later round begin a
    sentence earlier. Whatever goes wrong with them, the answer is the best so far.

    limits: the most tokens of the answer; None: no such limit. max_model_len, tokenizer: of the
    served model.
    """

    endings: int
    limits: tuple[int | None, ...]
    max_model_len: int
    tokenizer: Any
    bounds: Bounds

    async def sample(self, vllm: Upstream, request: dict[str, Any], report: Report) -> Sampled:
        started = time.monotonic()
        reply = await vllm.ask(request)
        if reply.answer is None:
            return Sampled(reply)
        (text,) = texts_of(reply.answer)
        draft = Draft(reply.answer, report.outcome(text), self.tokenizer)
        if self._needs_another(draft):
            limit = self.bounds.patience * (time.monotonic() - started)
            await self._rewrite(for_text(vllm), request, report, draft, limit)
        return Sampled(reply, [draft.outcome], draft.sampled, draft.endings)

    async def stream(
        self, vllm: Upstream, request: dict[str, Any], report: Report, send: Any, wants_ids: bool
    ) -> None:
        started = time.monotonic()

        async def improve(draft: Draft) -> None:
            if not self._needs_another(draft) or self._is_full(draft):
                return
            stopped = time.monotonic()
            limit = min(self.bounds.patience * (stopped - started), self.bounds.pause)
            await self._rewrite(for_text(vllm), request, report, draft, limit)
            self.bounds.counters.add("stream_pauses")
            self.bounds.counters.add("stream_pause_seconds", time.monotonic() - stopped)

        def paced(prompt: int) -> Pace:
            return Pace(landing_before(self.target, self._wall(prompt)), self.target.unit)

        held = HeldStream(send, report, wants_ids, paced, improve, self.tokenizer)
        try:
            await vllm.forward(request, held)
        except Exception:
            await held.flush()
            raise

    def _wall(self, prompt: int) -> int:
        """The most tokens of the answer to a prompt of so many."""
        return min([self.max_model_len - prompt, *(n for n in self.limits if n is not None)])

    def _needs_another(self, draft: Draft) -> bool:
        """Whether its end is bad, steering had a part in that, and the values that it wants are
        there for more."""
        if draft.finish_reason not in ("stop", "length"):
            return False  # vLLM gave up
        step, (_, missed) = draft.outcome.step, draft.outcome.faults(self.target)
        if step is None or self._is_good(draft):
            return False
        if self.target.wants_values and not step.valued:
            return False
        return (step.forced or step.landing or missed > 0) and draft.is_all_text()

    def _is_good(self, draft: Draft) -> bool:
        kind, missed = draft.outcome.faults(self.target)
        width = width_of(self.target.limits[1], self.target.tolerance or 0)
        return kind < _CUT and missed <= width

    def _is_full(self, draft: Draft) -> bool:
        """Whether requests wait in vLLM's queue, or a stream would have to wait for its round."""
        stands_in_line = draft.streamed and self.bounds.rounds.locked()
        return stands_in_line or self.bounds.waiting() > 0

    async def _rewrite(
        self, vllm: Upstream, request: dict[str, Any], report: Report, draft: Draft, limit: float
    ) -> None:
        """Rounds of endings, for `limit` seconds at most; the best one becomes the draft's."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(limit):
                await self._rounds(vllm, request, report, draft)
        except TimeoutError:
            pass
        except Exception:
            logger.exception("length targets: other endings failed, the first one is returned")
        self.bounds.counters.add("ending_seconds", time.monotonic() - started)

    async def _rounds(
        self, vllm: Upstream, request: dict[str, Any], report: Report, draft: Draft
    ) -> None:
        most = self.target.limits[1] if self.target.unit == UNITS[0] else draft.sampled
        cut = min(draft.sampled, most) - TAIL
        while draft.endings < self.endings and not self._is_good(draft):
            begin, n = max(draft.kept, cut), min(ROUND, self.endings - draft.endings)
            if self._is_full(draft):
                return
            async with self.bounds.rounds:
                if self.bounds.waiting() > 0:
                    return
                wall = self._wall(len(draft.prompt_ids))
                wish = continuation(request, self.target, draft, begin, n, wall)
                goes_on = await self._round(vllm, wish, report, draft, begin)
            if not goes_on:
                return  # the next ones will be no better
            cut -= SENTENCE

    async def _round(
        self, vllm: Upstream, wish: dict[str, Any], report: Report, draft: Draft, cut: int
    ) -> bool:
        """Endings behind the draft's first `cut` tokens, up to a good one; the best is the draft's.

        Whether there were any, and one had the values that it wants.
        """
        report = replace(report, key=uuid.uuid4().hex)

        def take(ids: list[int], outcome: Outcome) -> bool:
            text = draft.text_with(cut, ids)
            outcome = replace(outcome, length=cut + outcome.length, text=text)
            better = outcome.faults(self.target) < draft.outcome.faults(self.target)
            if better and draft.can_end_with(outcome):
                draft.end_with(cut, ids, outcome)
            return self._is_good(draft)

        heard = Round(report, take)
        try:
            await vllm.listen(keyed(wish | {"stream": True}, report.key), heard, heard.enough)
        finally:
            if heard.tokens:
                self._count(heard.tokens, draft)
        return bool(heard.tokens) and (heard.valued or not self.target.wants_values)

    def _count(self, tokens: list[int], draft: Draft) -> None:
        """What a round has cost. tokens: of each ending."""
        draft.endings += len(tokens)
        draft.sampled += sum(tokens)
        self.bounds.counters.add("ending_rounds")
        self.bounds.counters.add("endings", len(tokens))
        self.bounds.counters.add("ending_tokens", sum(tokens))
