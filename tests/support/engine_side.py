"""The engine's side of an answer: a fake vLLM that tells of its texts as the real plugin does."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lenvm_vllm.api.routes import CHAT
from lenvm_vllm.host import served
from lenvm_vllm.telemetry.metrics import FOLDER
from lenvm_vllm.telemetry.progress import FORCED, KEY, LANDING, UNSEEN, VALUED, Progress

EOS = 0
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
BAD = 0.01  # probability of an end that the model would not have taken


@dataclass(frozen=True)
class Told:
    """A text of `length` tokens, the end included, all of them `letter`; and what is known of it.

    content: what the client gets, where that is not its letters.
    """

    length: int
    p_end: float = 0.5
    letter: str = "a"
    forced: bool = False
    landing: bool = True
    valued: bool = True
    unseen: bool = False
    finish: str = "stop"
    stop_reason: int | str | None = None
    content: str | None = None

    @property
    def ids(self) -> list[int]:
        return [ord(self.letter)] * (self.length - 1) + [EOS]

    @property
    def text(self) -> str:
        return self.letter * (self.length - 1) if self.content is None else self.content


def tell(engine: Progress, key: str, told: Told, counted: int | None = None) -> None:
    """The last step of a text, as the engine tells it."""
    if (row := engine.open(key)) is None:
        return
    ids = told.ids
    engine.tell(
        rows=[row],
        index=[len(ids) - 1],
        counted=[counted or len(ids)],
        token=[ids[-2] if len(ids) > 1 else -1],
        p_end=[told.p_end],
        expected=[0.0 if told.forced else math.nan],
        flags=[
            FORCED * told.forced
            | LANDING * told.landing
            | VALUED * told.valued
            | UNSEEN * told.unseen
        ],
        steps=[len(ids)],
        steered=[len(ids) - 1],
    )


class App:
    """Answers with the first texts, then with the next ones, and keeps what it was asked.

    status: of all answers but the first.
    """

    def __init__(self, *rounds: Sequence[Told], status: int = 200) -> None:
        self.rounds, self.status = list(rounds), status
        self.asked: list[tuple[str, Any]] = []
        self.engine = Progress()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = json.loads((await receive())["body"])
        path, number = scope["path"], len(self.asked)
        self.asked.append((path, request))
        before = request["vllm_xargs"].get("length_prefix_tokens", 0)
        for told in self.rounds[number]:
            tell(self.engine, request["vllm_xargs"][KEY], told, before + told.length)
        body = json.dumps(answer_of(path, self.rounds[number])).encode()
        headers = [(b"Content-Length", b"%d" % len(body)), (b"x-request-id", b"r")]
        status = self.status if number else 200
        if request.get("stream") and status == 200:  # a round
            body, headers = b"data: %b\n\ndata: [DONE]\n\n" % body, [EVENTS]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body[:9], "more_body": True})
        await send({"type": "http.response.body", "body": body[9:]})


def answer_of(path: str, texts: Sequence[Told]) -> dict[str, Any]:
    choices = [_choice(path == CHAT, index, told) for index, told in enumerate(texts)]
    tokens = sum(told.length for told in texts)
    usage = {"prompt_tokens": 2, "completion_tokens": tokens, "total_tokens": tokens + 2}
    answer = {"id": "r", "choices": choices, "usage": usage}
    for body in [answer] if path == CHAT else choices:
        body["prompt_token_ids"] = [65, 66]
    return answer


def content_of(choice: Any) -> str:
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def _choice(chat: bool, index: int, told: Told) -> dict[str, Any]:
    message = {"role": "assistant", "content": told.text}
    return {
        "index": index,
        "finish_reason": told.finish,
        "stop_reason": told.stop_reason,
        "token_ids": told.ids,
        "logprobs": None,
    } | ({"message": message} if chat else {"text": told.text})


class Tokenizer:
    """Token i is the letter i; the end is nothing."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(i) for i in ids if i != EOS)


def round_of(*endings: tuple[int, float], cut: int = 0, **known: Any) -> list[Told]:
    """Endings b, c, d … of texts with so many tokens, behind their first `cut`."""
    return [
        Told(length - cut, p_end, "bcde"[i], **known) for i, (length, p_end) in enumerate(endings)
    ]


def serve(patch: pytest.MonkeyPatch, folder: Path) -> SimpleNamespace:
    """The configuration of an API server whose engine tells of its texts in `folder`."""
    patch.setenv(FOLDER, str(folder))
    config = SimpleNamespace(
        reasoning_config=None,
        model_config=SimpleNamespace(
            max_model_len=1000, skip_tokenizer_init=False, override_generation_config={}
        ),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        parallel_config=SimpleNamespace(data_parallel_size=1, enable_batch_sharded_sampling=False),
        speculative_config=None,
        additional_config={},
        scheduler_config=None,
    )
    patch.setattr(served, "config", config)
    patch.setattr("lenvm_vllm.api.middleware.tokenizer_of", lambda config: Tokenizer())
    return config
