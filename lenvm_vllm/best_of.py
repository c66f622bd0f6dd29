"""`best_of`: several answers are sampled side by side, and those that end best are returned.

How an answer ends is read from the logprob of its last token, which vLLM takes before any
logits processor: the model's own judgement of an end at that place.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from lenvm_vllm.asgi import ask, compact, respond
from lenvm_vllm.rails import rails_of
from lenvm_vllm.request import NATURAL, LengthTarget

SAMPLED = "lenvm-sampled-tokens"  # response header: tokens of all answers, the dropped ones too


@dataclass(frozen=True)
class Choosing:
    """returned: answers to each prompt that the client wants. logprobs: whether it wants those."""

    target: LengthTarget
    best_of: int
    returned: int
    logprobs: bool

    @classmethod
    def of(cls, request: dict[str, Any], target: LengthTarget, best_of: int) -> "Choosing":
        """Changes `request` so that it samples `best_of` answers and tells their logprobs."""
        text = "messages" not in request  # a text completion, whose `logprobs` is a number
        known = request.get("logprobs")
        wanted = type(known) is int if text else known is True
        choosing = cls(target, best_of, request.get("n") or 1, wanted)
        request["n"] = best_of
        if not wanted:
            request["logprobs"] = 0 if text else True
        return choosing

    def choose(self, answer: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The answer with its best choices alone, and the tokens of all of them.

        `usage` counts what is returned, so that it still tells how long an answer is.
        """
        prompts: dict[int, list[dict[str, Any]]] = {}
        for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
            prompts.setdefault(choice["index"] // self.best_of, []).append(choice)
        chosen = [
            choice
            for choices in prompts.values()
            for choice in sorted(choices, key=self._faults)[: self.returned]
        ]
        usage = dict(answer["usage"])
        sampled, usage["completion_tokens"] = usage["completion_tokens"], sum(map(_length, chosen))
        usage["total_tokens"] += usage["completion_tokens"] - sampled
        choices = [choice | {"index": index} for index, choice in enumerate(chosen)]
        if not self.logprobs:
            choices = [choice | {"logprobs": None} for choice in choices]
        return answer | {"choices": choices, "usage": usage}, sampled

    def _faults(self, choice: dict[str, Any]) -> tuple[bool, int]:
        return Ending.of(choice).faults(self.target)


@dataclass(frozen=True)
class Ending:
    """length: of the whole answer, the end included. p_end: the unguided model's probability of
    its end. ended: not cut by a limit."""

    length: int
    p_end: float
    ended: bool

    @classmethod
    def of(cls, choice: dict[str, Any], before: int = 0) -> "Ending":
        """Of a choice with its logprobs. before: tokens of the answer that it continues."""
        logprobs = _logprobs(choice)
        p_end = math.exp(logprobs[-1]) if logprobs else 0.0
        if isinstance(choice.get("stop_reason"), str):  # a stop string
            p_end = 1.0
        return cls(before + len(logprobs), p_end, choice["finish_reason"] != "length")

    def faults(self, target: LengthTarget) -> tuple[bool, int]:
        """Less is better: no natural end, then the tokens by which it misses the target.

        Rails that leave the end one place are not held against it.
        """
        rails = rails_of(target)
        forced = rails.last is not None and self.length >= rails.last > rails.first
        natural = self.ended and not forced and self.p_end >= NATURAL
        low, high = target.limits
        missed = {"at_most": self.length - high, "at_least": low - self.length}.get(
            target.mode, max(low - self.length, self.length - high)
        )
        return not natural, max(missed, 0)


def _length(choice: dict[str, Any]) -> int:
    """Tokens of a choice, the end included."""
    return len(_logprobs(choice))


def _logprobs(choice: dict[str, Any]) -> list[float]:
    logprobs = choice["logprobs"]
    if "content" in logprobs:  # of a chat
        return [token["logprob"] for token in logprobs["content"] or ()]
    return list(logprobs["token_logprobs"])


@dataclass(frozen=True)
class WholeAnswers:
    """ASGI application: the best of so many answers of `app`, side by side."""

    app: Any
    target: LengthTarget
    best_of: int

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = json.loads((await receive())["body"])
        choosing = Choosing.of(request, self.target, self.best_of)
        start, body, answer = await ask(self.app, scope, request, receive)
        if answer is None:
            await respond(send, start, body)
            return
        answer, sampled = choosing.choose(answer)
        await respond(send, start, compact(answer), (SAMPLED, sampled))
