"""The answer to a guided request: sampled by vLLM, made better where that goes, and explained."""

import json
import logging
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

from lenvm_vllm.api.asgi import ask, compact, replay, request_of, respond
from lenvm_vllm.api.outcome import RESULT, Outcome
from lenvm_vllm.api.streams import Told, hide_ids
from lenvm_vllm.api.texts import Text, texts_of
from lenvm_vllm.host import served
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.telemetry.progress import KEY, Known

logger = logging.getLogger("vllm.lenvm")

SAMPLED = "lenvm-sampled-tokens"  # response header: tokens of all answers, the dropped ones too

_WITHOUT_IDS = ("/responses", "/messages")  # routes that tell no token ids


@dataclass
class Sampled:
    """An answer, None for an error, and what was sampled for it.

    tokens: of everything that was sampled, 0 where that is the answer alone. endings: how many
    there are of each text. outcomes: of choices whose last tokens are of another request.
    """

    start: Any
    body: bytes
    answer: dict[str, Any] | None
    tokens: int = 0
    endings: int = 1
    outcomes: dict[int, Outcome] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """ASGI application: an answer of `app` to a guided request, with its RESULT.

    predicted: tokens that were forecast for it.
    """

    app: Any
    target: LengthTarget
    known: Known
    predicted: int | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = json.loads((await receive())["body"])
        key = uuid.uuid4().hex
        asked = keyed(request, key)
        # An echo of the prompt is none of the text.
        echo = request.get("prompt") if request.get("echo") else None
        before = echo if isinstance(echo, str) else ""
        if not scope["path"].rstrip("/").endswith(_WITHOUT_IDS) and not request.get("echo"):
            asked["return_token_ids"] = True
        if request.get("stream") is True:
            told = Told(
                send,
                tell=lambda text: self._tell(text, self._outcome(text, key, before)),
                step=lambda ids: self.known.step(key, ids, len(ids)),
                every=self.target.progress,
                unit=self.target.unit,
                wants_ids=request.get("return_token_ids") is True,
            )
            await self.app(scope, replay([request_of(json.dumps(asked).encode())], receive), told)
            return
        sampled = await self.sample(scope, receive, asked, key)
        if sampled.answer is None:
            await respond(send, sampled.start, sampled.body)
            return
        for index, text in enumerate(texts_of(sampled.answer)):
            outcome = sampled.outcomes.get(index) or self._outcome(text, key, before)
            self._tell(text, outcome, sampled.tokens, sampled.endings)
            if sampled.tokens and served.logs_answers:  # vLLM logs what was sampled for it
                name = sampled.answer.get("id")
                logger.info("%s, returned, the best of %d: %r", name, sampled.endings, text.text)
        if request.get("return_token_ids") is not True:
            hide_ids(sampled.answer)
        headers = [(SAMPLED, sampled.tokens)] if sampled.tokens else []
        await respond(send, sampled.start, compact(sampled.answer), *headers)

    async def sample(self, scope: Any, receive: Any, request: dict[str, Any], key: str) -> Sampled:
        """vLLM's own answer to `request`, which has `key`."""
        start, body, answer = await ask(self.app, scope, request, receive)
        return Sampled(start, body, answer)

    def _outcome(self, text: Text, key: str, before: str) -> Outcome:
        outcome = text.outcome(self.known, key)
        return replace(outcome, text=outcome.text.removeprefix(before))

    def _tell(self, text: Text, outcome: Outcome, sampled: int = 0, endings: int = 1) -> None:
        """Put its RESULT into a text's own object."""
        if outcome.forced and outcome.end == "cut":
            text.call_cut()
        tokens = sampled or outcome.length
        text.body[RESULT] = outcome.result(self.target, tokens, endings, self.predicted)


def keyed(request: dict[str, Any], key: str) -> dict[str, Any]:
    """The request whose texts the engine tells about under this key."""
    return request | {"vllm_xargs": request["vllm_xargs"] | {KEY: key}}
