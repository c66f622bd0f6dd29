"""The answer to a guided request: sampled by vLLM, and explained."""

import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lenvm_vllm.api.asgi import Reply, Upstream
from lenvm_vllm.api.outcome import Outcome, Report
from lenvm_vllm.api.routes import streams, whole
from lenvm_vllm.api.streams import Stream, hide_ids
from lenvm_vllm.api.texts import texts_of
from lenvm_vllm.host import served
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.telemetry.progress import KEY, Known

logger = logging.getLogger("vllm.lenvm")

SAMPLED = "lenvm-sampled-tokens"  # response header: tokens of all answers, the dropped ones too

_WITHOUT_IDS = ("/responses", "/messages")  # routes that tell no token ids


@dataclass
class Sampled:
    """An answer and what was sampled for it.

    outcomes: of its texts. tokens: of everything that was sampled, 0 where that is the answer
    alone. endings: how many there are of each text.
    """

    reply: Reply
    outcomes: Sequence[Outcome] = ()
    tokens: int = 0
    endings: int = 1


@dataclass(frozen=True)
class Answers:
    """vLLM's own answer with its RESULT; the classes below it sample more for one that is better.

    predicted: tokens that were forecast for it.
    """

    target: LengthTarget
    known: Known
    predicted: int | None = None

    async def respond(self, vllm: Upstream, request: dict[str, Any], send: Any) -> None:
        """Answer the request of `vllm`, whose target has been moved to where the engine reads."""
        key, prompt = uuid.uuid4().hex, request.get("prompt")
        echoes, wants_ids = bool(request.get("echo")), request.get("return_token_ids") is True
        prompts = (prompt if isinstance(prompt, list) else [prompt]) if echoes else []
        texts = [text if isinstance(text, str) else "" for text in prompts]
        each = whole(request, "n") or 1
        report = Report(self.target, self.known, key, self.predicted, texts, each)
        asked = keyed(request, key)
        # With token ids vLLM would leave the prompt out of an echo.
        if not echoes and not vllm.scope["path"].rstrip("/").endswith(_WITHOUT_IDS):
            asked["return_token_ids"] = True
        if streams(request):
            await self.stream(vllm, asked, report, send, wants_ids)
            return
        sampled = await self.sample(vllm, asked, report)
        if (answer := sampled.reply.answer) is not None:
            _explain(answer, sampled, report)
            if not wants_ids:
                hide_ids(answer)
        await sampled.reply.send(send, {SAMPLED: sampled.tokens} if sampled.tokens else {})

    async def stream(
        self, vllm: Upstream, request: dict[str, Any], report: Report, send: Any, wants_ids: bool
    ) -> None:
        """Of a request that has the key of `report`; wants_ids: as of `Stream`."""
        await vllm.forward(request, Stream(send, report, wants_ids))

    async def sample(self, vllm: Upstream, request: dict[str, Any], report: Report) -> Sampled:
        """Of a request that has the key of `report`."""
        reply = await vllm.ask(request)
        return Sampled(reply, [report.outcome(text) for text in texts_of(reply.answer or {})])


def _explain(answer: dict[str, Any], sampled: Sampled, report: Report) -> None:
    """Put its RESULT into each text of an answer."""
    for text, outcome in zip(texts_of(answer), sampled.outcomes, strict=True):
        report.put(text, outcome, sampled.tokens, sampled.endings)
        if sampled.tokens:
            log_chosen(answer.get("id"), sampled.endings, text.text)


def log_chosen(name: str | None, of: int, text: str) -> None:
    """What is returned, where vLLM itself logs all that was sampled for it."""
    if served.logs_answers:
        logger.info("%s, returned, the best of %d: %r", name, of, text)


def keyed(request: dict[str, Any], key: str) -> dict[str, Any]:
    """The request whose texts the engine tells about under this key."""
    return request | {"vllm_xargs": request["vllm_xargs"] | {KEY: key}}
