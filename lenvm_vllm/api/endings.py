"""Other endings: an answer that does not end well is written again from shortly before its end.

Only the way that a text ends tells whether its length was meant, so only that is sampled anew:
vLLM has the text before it in its prefix cache, and the value server in its own. A continuation
is a text completion whose prompt is the answer's tokens; `prefix_tokens` tells the plugin how
many of them count.

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
from lenvm_vllm.api.asgi import ask
from lenvm_vllm.api.doors import CHAT, TEXT
from lenvm_vllm.api.fields import CARRIED, allow_endings
from lenvm_vllm.api.outcome import ENDS, Outcome
from lenvm_vllm.api.texts import texts_of
from lenvm_vllm.steering.constants import SENTENCE
from lenvm_vllm.target.rails import rails_of
from lenvm_vllm.target.request import PREFIX, LengthTarget
from lenvm_vllm.telemetry.metrics import Counters
from lenvm_vllm.text.tokenizer import decoded
from value_server.contract.units import CHARACTERS, UNITS, WORDS

logger = logging.getLogger("vllm.lenvm")

ROUND = 4  # endings that are sampled side by side
TAIL = 2 * SENTENCE  # tokens before the end from which the first of them begin
NARROW = 0.5  # of the tolerance is theirs: with several at hand the target may be met closer
ROOM = {UNITS[0]: 4, WORDS: 3, CHARACTERS: 16}  # of it that they keep, in the target's unit
NEAR = 0.25  # of the tolerance, or a token, that a good ending may miss its target by
_CUT = ENDS.index("cut")
_CONTEXT = 8  # tokens before a text that may tell how it is decoded


def can_continue(request: dict[str, Any], target: LengthTarget) -> bool:
    """Whether the answer to this request can be continued as a text completion of its tokens.

    Not one of several answers, a greedy one, and none with a field that has to know of the text
    before the continuation (`fields.py`).
    """
    return (
        target.mode in ("equal_to", "at_most", "range")
        and target.scope == "completion"
        and not target.prefix_tokens
        and allow_endings(request)
        and request.get("n") in (None, 1)
        and request.get("temperature") != 0
    )


def narrowed(target: LengthTarget) -> LengthTarget:
    """The target of other endings, whose rails are nearer."""
    tolerance = target.tolerance
    if target.mode != "equal_to" or tolerance is None:
        return target
    nearer = min(tolerance, max(tolerance * NARROW, ROOM[target.unit] / target.limits[0]))
    return target.model_copy(update={"tolerance": nearer})


@dataclass(frozen=True)
class Bounds:
    """What the endings of all requests of an API server process share.

    rounds: how many rounds may run at a time. patience: how long a request may look for endings,
    in times of what its first answer took. waiting: requests that wait in vLLM's queue.
    """

    rounds: asyncio.Semaphore
    patience: float
    waiting: Callable[[], float]
    counters: Counters = field(default_factory=Counters)


@dataclass(frozen=True)
class Endings(Answers):
    """The answer with the best of up to `endings` endings.

    More are sampled, ROUND at a time, only while none is good; those of a later round begin a
    sentence earlier. Whatever goes wrong with them, the answer is what it was.

    max_model_len, tokenizer: of the served model.
    """

    endings: int = 1
    max_model_len: int = 0
    tokenizer: Any = None
    bounds: Bounds | None = None

    async def sample(self, scope: Any, receive: Any, request: dict[str, Any], key: str) -> Sampled:
        started = time.monotonic()
        start, body, answer = await ask(self.app, scope, request, receive)
        if answer is None:
            return Sampled(start, body, None)
        (text,) = texts_of(answer)
        draft = Draft.of(answer, text.outcome(self.known, key), self.tokenizer)
        if self._needs_another(draft) and self.bounds is not None:
            limit = self.bounds.patience * (time.monotonic() - started)
            await self._rewrite(scope, receive, request, draft, limit)
        outcome = {0: draft.outcome}
        return Sampled(start, body, draft.answer(), draft.sampled, draft.endings, outcome)

    def _needs_another(self, draft: "Draft") -> bool:
        """Whether its end is bad, steering had a part in that, and values are there for more."""
        outcome = draft.outcome
        kind, missed = outcome.faults(self.target)
        if outcome.step is None or not outcome.step.valued or self._is_good(kind, missed):
            return False
        acted = outcome.step.forced or outcome.step.landing or missed > 0
        return acted and draft.is_all_text()

    def _is_good(self, kind: int, missed: int) -> bool:
        width = (self.target.tolerance or 0.0) * self.target.limits[1]
        return kind < _CUT and missed <= max(NEAR * width, min(1, width))

    async def _rewrite(
        self, scope: Any, receive: Any, request: dict[str, Any], draft: "Draft", limit: float
    ) -> None:
        """Rounds of endings, for `limit` seconds at most; the best one becomes the draft's."""
        assert self.bounds is not None
        started, counters = time.monotonic(), self.bounds.counters
        try:
            async with asyncio.timeout(limit):
                await self._rounds(scope, receive, request, draft)
        except TimeoutError:
            pass
        except Exception:
            logger.exception("length targets: other endings failed, the first one is returned")
        counters.add("ending_seconds", time.monotonic() - started)

    async def _rounds(
        self, scope: Any, receive: Any, request: dict[str, Any], draft: "Draft"
    ) -> None:
        assert self.bounds is not None
        best, nearer = draft.outcome.faults(self.target), narrowed(self.target)
        most = self.target.limits[1] if self.target.unit == UNITS[0] else draft.sampled
        cut = min(draft.sampled, most) - TAIL
        while draft.endings < self.endings and not self._is_good(*best):
            async with self.bounds.rounds:
                if self.bounds.waiting() > 0:
                    return
                found = await self._round(scope, receive, request, draft, max(0, cut))
            if not any(outcome.step and outcome.step.valued for _, outcome in found):
                return  # without values the next ones will be no better
            for ids, outcome in found:
                if (faults := outcome.faults(nearer)) < best:
                    best = faults
                    draft.end_with(max(0, cut), ids, outcome)
            cut -= SENTENCE

    async def _round(
        self, scope: Any, receive: Any, request: dict[str, Any], draft: "Draft", cut: int
    ) -> list[tuple[list[int], Outcome]]:
        """Tokens and outcomes of other endings behind the draft's first `cut` tokens.

        An outcome is that of the whole text. None where vLLM refused them.
        """
        assert self.bounds is not None
        key, counters = uuid.uuid4().hex, self.bounds.counters
        wish = keyed(self._continuation(request, draft, cut), key)
        _, _, answer = await ask(self.app, _as_text(scope), wish, receive)
        if answer is None:
            return []
        counters.add("ending_rounds")
        counters.add("endings", len(answer["choices"]))
        counters.add("ending_tokens", answer["usage"]["completion_tokens"])
        draft.sampled += answer["usage"]["completion_tokens"]
        draft.endings += len(answer["choices"])
        return [
            (ids, replace(outcome, length=cut + outcome.length, text=draft.text_with(cut, ids)))
            for text in texts_of(answer)
            for ids, outcome in [(text.ids or [], text.outcome(self.known, key))]
        ]

    def _continuation(self, request: dict[str, Any], draft: "Draft", cut: int) -> dict[str, Any]:
        """The request for other endings behind the draft's first `cut` tokens."""
        prompt = draft.prompt_ids + draft.ids[:cut]
        target = narrowed(self.target).model_copy(update={"prefix_tokens": cut})
        limits = [request.get(name) for name in ("max_completion_tokens", "max_tokens")]
        given = [limit - cut for limit in limits if limit is not None][:1]
        last = rails_of(target).last
        railed = [] if last is None else [last - cut]
        other = {k: v for k, v in request["vllm_xargs"].items() if not k.startswith(PREFIX)}
        wish = {name: request[name] for name in CARRIED & request.keys()} | {
            "prompt": prompt,
            "n": min(ROUND, self.endings - draft.endings),
            "max_tokens": max(1, min([self.max_model_len - len(prompt), *given, *railed])),
            "min_tokens": max(0, (request.get("min_tokens") or 0) - cut),
            "return_token_ids": True,
            "vllm_xargs": other | target.to_xargs(),
        }
        if request.get("seed") is not None:  # with the same one, the same ending again
            wish["seed"] = request["seed"] + draft.endings
        return wish


@dataclass
class Draft:
    """An answer of one choice, whose end may yet change.

    endings, sampled: how many endings it had, and the tokens of all of them.
    """

    prompt_ids: list[int]
    ids: list[int]
    outcome: Outcome
    sampled: int
    _answer: dict[str, Any]
    _tokenizer: Any
    endings: int = 1
    _changed: bool = False

    @classmethod
    def of(cls, answer: dict[str, Any], outcome: Outcome, tokenizer: Any) -> "Draft":
        """Of an answer with token ids; without them its tokens are not known and it stays."""
        (choice,) = answer["choices"]
        prompt_ids = (answer if "message" in choice else choice).get("prompt_token_ids") or []
        ids = choice.get("token_ids") or []
        return cls(prompt_ids, ids, outcome, outcome.length, answer, tokenizer)

    @property
    def choice(self) -> dict[str, Any]:
        choice: dict[str, Any] = self._answer["choices"][0]
        return choice

    def is_all_text(self) -> bool:
        """Whether its tokens are its text: no part of them went elsewhere, as a thinking does."""
        known = self.choice.get("message", self.choice)
        text = known.get("content", known.get("text"))
        return bool(self.prompt_ids and self.ids) and self.text_with(len(self.ids), []) == text

    def end_with(self, cut: int, ids: list[int], outcome: Outcome) -> None:
        """Take another ending, behind the first `cut` tokens."""
        before, step = self.outcome.step, outcome.step
        if before is not None and step is not None:
            steered = min(cut, before.steered) + step.steered
            step = replace(step, steps=cut + step.steps, steered=steered)
        self.ids, self._changed = self.ids[:cut] + ids, True
        self.outcome = replace(outcome, step=step)

    def answer(self) -> dict[str, Any]:
        """As the client gets it, `usage` counting what is returned."""
        if self._changed:
            reason = "length" if self.outcome.limited else "stop"
            self.choice.update(finish_reason=reason, token_ids=self.ids)
            if "message" in self.choice:
                self.choice["message"]["content"] = self.outcome.text
            else:
                self.choice["text"] = self.outcome.text
            usage = self._answer["usage"]
            usage["completion_tokens"] = len(self.ids)
            usage["total_tokens"] = usage["prompt_tokens"] + len(self.ids)
        return self._answer

    def text_with(self, cut: int, ids: list[int]) -> str:
        """Its first `cut` tokens and others behind them, decoded behind the prompt."""
        before = self.prompt_ids[-_CONTEXT:]
        skipped = len(decoded(self._tokenizer, before))
        return decoded(self._tokenizer, [*before, *self.ids[:cut], *ids])[skipped:]


def _as_text(scope: Any) -> Any:
    """The same request to the route of text completions; /invocations is that, too."""
    path = scope["path"].rstrip("/")
    if path.endswith(CHAT):
        path = path.removesuffix(CHAT) + TEXT
    return {**scope, "path": path, "raw_path": path.encode()}
