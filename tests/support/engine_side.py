"""The engine's side of an answer: a fake vLLM that tells of its texts as the real plugin does."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lenvm_vllm.telemetry.progress import FORCED, KEY, LANDING, VALUED, Progress

CHAT = "/v1/chat/completions"
EOS = 0


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
    finish: str = "stop"
    stop_reason: str | None = None
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
        flags=[FORCED * told.forced | LANDING * told.landing | VALUED * told.valued],
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
        answer = answer_of(path, self.rounds[number])
        body = json.dumps(answer).encode()
        headers = [(b"Content-Length", b"%d" % len(body)), (b"x-request-id", b"r")]
        status = self.status if number else 200
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


def _choice(chat: bool, index: int, told: Told) -> dict[str, Any]:
    message = {"role": "assistant", "content": told.text}
    return {
        "index": index,
        "finish_reason": told.finish,
        "stop_reason": told.stop_reason,
        "token_ids": told.ids,
        "logprobs": None,
    } | ({"message": message} if chat else {"text": told.text})
