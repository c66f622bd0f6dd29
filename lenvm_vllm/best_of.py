"""`best_of`: several answers are sampled side by side, and those that end best are returned.

How an answer ends is read from the logprob of its last token, which vLLM takes before any
logits processor: the model's own judgement of an end at that place.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from lenvm_vllm.rails import rails_of
from lenvm_vllm.request import NATURAL, LengthTarget

SAMPLED = "lenvm-sampled-tokens"  # response header: tokens of all answers, the dropped ones too


@dataclass(frozen=True)
class Choosing:
    """returned: answers to each prompt that the client wants. logprobs: whether it wants those."""

    target: LengthTarget
    returned: int
    logprobs: bool

    @classmethod
    def of(cls, request: dict[str, Any], target: LengthTarget, text: bool) -> "Choosing":
        """Changes `request` so that it samples `best_of` answers and tells their logprobs.

        text: a text completion, whose field `logprobs` is a number.
        """
        known = request.get("logprobs")
        wanted = type(known) is int if text else known is True
        choosing = cls(target, request.get("n") or 1, wanted)
        request["n"] = target.best_of
        if not wanted:
            request["logprobs"] = 0 if text else True
        return choosing

    def choose(self, answer: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The answer with its best choices alone, and the tokens of all of them.

        `usage` counts what is returned, so that it still tells how long an answer is.
        """
        prompts: dict[int, list[dict[str, Any]]] = {}
        for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
            prompts.setdefault(choice["index"] // self.target.best_of, []).append(choice)
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
        """Less is better: no natural end, then the tokens by which it misses the target."""
        length, last = _length(choice), rails_of(self.target).last
        ended = choice["finish_reason"] != "length" and (last is None or length < last)
        low, high = self.target.limits
        missed = {"at_most": length - high, "at_least": low - length}.get(
            self.target.mode, max(low - length, length - high)
        )
        return not (ended and _p_end(choice) >= NATURAL), max(missed, 0)


def _length(choice: dict[str, Any]) -> int:
    """Tokens of a choice, the end included."""
    return len(_logprobs(choice))


def _p_end(choice: dict[str, Any]) -> float:
    """The unguided model's probability of its end; 1 where a stop string ended it."""
    if isinstance(choice.get("stop_reason"), str):
        return 1.0
    logprobs = _logprobs(choice)
    return math.exp(logprobs[-1]) if logprobs else 0.0


def _logprobs(choice: dict[str, Any]) -> list[float]:
    logprobs = choice["logprobs"]
    if "content" in logprobs:  # of a chat
        return [token["logprob"] for token in logprobs["content"] or ()]
    return list(logprobs["token_logprobs"])


def choosing_send(send: Any, choosing: Choosing) -> Any:
    """An ASGI `send` that waits for the whole answer and sends what is chosen of it."""
    start: dict[str, Any] = {}
    parts: list[bytes] = []

    async def send_chosen(message: Any) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
            return
        parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body = b"".join(parts)
        if start["status"] == 200:
            answer, sampled = choosing.choose(json.loads(body))
            body = json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
            kept = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
            more = [(b"content-length", b"%d" % len(body)), (SAMPLED.encode(), b"%d" % sampled)]
            start["headers"] = [*kept, *more]
        await send(start)
        await send({"type": "http.response.body", "body": body})

    return send_chosen
