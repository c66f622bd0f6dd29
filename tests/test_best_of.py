"""Several answers to a request: which of them is returned, and what else the client is told."""

import asyncio
import json
import math
from typing import Any

import pytest

from lenvm_vllm.best_of import Choosing
from lenvm_vllm.middleware import CHAT, TEXT, LengthTargetMiddleware
from lenvm_vllm.request import LengthTarget

LIKELY, UNLIKELY = math.log(0.3), math.log(0.01)
TEN = {"tokens": 10, "best_of": 3, "tolerance": 0.1}  # rails 9 to 11


def chat(index: int, length: int, end: float = LIKELY, finish: str = "stop") -> dict[str, Any]:
    """A choice of a chat; end: logprob of its last token."""
    tokens = [{"token": "x", "logprob": p} for p in [-1.0] * (length - 1) + [end]]
    message = {"role": "assistant", "content": f"answer {index}"}
    named = {"index": index, "message": message, "finish_reason": finish}
    return named | {"logprobs": {"content": tokens}, "stop_reason": None}


def text(index: int, length: int, end: float = LIKELY, finish: str = "stop") -> dict[str, Any]:
    logprobs = {"token_logprobs": [-1.0] * (length - 1) + [end]}
    named = {"index": index, "text": f"answer {index}", "finish_reason": finish}
    return named | {"logprobs": logprobs, "stop_reason": None}


def answer_of(*choices: dict[str, Any], total: int) -> dict[str, Any]:
    usage = {"prompt_tokens": 7, "completion_tokens": total, "total_tokens": 7 + total}
    return {"id": "a", "choices": list(choices), "usage": usage}


def chosen(target: dict[str, Any], *choices: dict[str, Any]) -> list[int]:
    """The choices, best first."""
    wish = LengthTarget.parse(target)
    choosing = Choosing(wish, wish.best_of or 1, len(choices), logprobs=False)
    answer, _ = choosing.choose(answer_of(*choices, total=99))
    return [int(choice["message"]["content"].split()[1]) for choice in answer["choices"]]


@pytest.mark.parametrize("of", [chat, text])
def test_a_natural_end_goes_before_a_near_one(of: Any) -> None:
    choosing = Choosing(LengthTarget.parse(TEN), 3, 1, logprobs=False)
    choices = of(0, 10, end=UNLIKELY), of(1, 9), of(2, 11)
    answer, sampled = choosing.choose(answer_of(*choices, total=30))
    assert answer["choices"] == [choices[1] | {"index": 0, "logprobs": None}]
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
    assert (sampled, answer["id"]) == (30, "a")


def test_of_natural_ends_the_nearest_and_of_equals_the_first() -> None:
    assert chosen(TEN, chat(0, 9), chat(1, 10), chat(2, 10)) == [1, 2, 0]
    assert chosen(TEN, chat(0, 9, end=UNLIKELY), chat(1, 11), chat(2, 10, end=UNLIKELY)) == [
        *(2, 0, 1)
    ]


def test_an_end_on_the_rail_or_at_max_tokens_is_forced() -> None:
    assert chosen(TEN, chat(0, 11, end=0.0), chat(1, 9), chat(2, 10, 0.0, "length")) == [1, 2, 0]


def test_where_the_rails_leave_one_place_the_likelier_end() -> None:
    exact = TEN | {"tolerance": 0}
    choices = chat(0, 10, end=UNLIKELY), chat(1, 10), chat(2, 10, 0.0, "length")
    assert chosen(exact, *choices) == [1, 0, 2]


def test_a_stop_string_is_an_end() -> None:
    stopped = chat(1, 10, end=-20.0) | {"stop_reason": "\n\n"}
    assert chosen(TEN, chat(0, 10, end=UNLIKELY), stopped, chat(2, 9, end=UNLIKELY))[0] == 1


@pytest.mark.parametrize(
    ("target", "lengths", "order"),
    [
        ({"mode": "at_most", "tokens": 20, "tolerance": None}, (25, 12, 22, 3), [1, 3, 2, 0]),
        ({"mode": "at_least", "tokens": 20, "tolerance": None}, (25, 12, 22, 3), [0, 2, 1, 3]),
        ({"mode": "range", "min_tokens": 10, "max_tokens": 20}, (10, 8, 15, 12), [0, 2, 3, 1]),
    ],
)
def test_other_modes_count_what_is_outside(
    target: dict[str, Any], lengths: tuple[int, ...], order: list[int]
) -> None:
    choices = [chat(index, length) for index, length in enumerate(lengths)]
    assert chosen(target | {"best_of": 4}, *choices) == order


def test_each_prompt_has_its_own_best() -> None:
    choosing = Choosing(LengthTarget.parse(TEN | {"best_of": 2}), 2, 1, logprobs=True)
    choices = [text(0, 9), text(1, 10), text(2, 10), text(3, 9)]
    answer, _ = choosing.choose(answer_of(*reversed(choices), total=38))
    assert answer["choices"] == [choices[1] | {"index": 0}, choices[2] | {"index": 1}]
    assert answer["usage"]["completion_tokens"] == 20


class App:
    """Answers with `body`, in two parts, and keeps what it was asked."""

    def __init__(self, body: bytes, status: int = 200) -> None:
        self.asked: dict[str, Any] = {}
        self.body, self.status = body, status

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked = json.loads((await receive())["body"])
        headers = [(b"Content-Length", b"%d" % len(self.body)), (b"x-request-id", b"r")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body[:9], "more_body": True})
        await send({"type": "http.response.body", "body": self.body[9:]})


def post(app: App, request: dict[str, Any], path: str) -> tuple[int, dict[bytes, bytes], bytes]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(request).encode(), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    asyncio.run(LengthTargetMiddleware(app)(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m["body"] for m in sent[1:])


PROMPT: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "?"}]},
    TEXT: {"prompt": "?"},
}
FLAT = {f"length_{key}": value for key, value in TEN.items() if key != "tokens"}


@pytest.mark.parametrize(
    "wish", [{"length_target": TEN}, {"vllm_xargs": {"length_target": 10} | FLAT}]
)
@pytest.mark.parametrize(("path", "of", "asked"), [(CHAT, chat, True), (TEXT, text, 0)])
def test_the_client_sees_one_answer(wish: dict[str, Any], path: str, of: Any, asked: Any) -> None:
    choices = of(0, 9), of(1, 10), of(2, 11)
    app = App(json.dumps(answer_of(*choices, total=30)).encode())
    status, headers, body = post(app, wish | {"max_tokens": 50} | PROMPT[path], path)
    assert (app.asked["n"], app.asked["logprobs"]) == (3, asked)
    assert (status, headers[b"lenvm-sampled-tokens"], headers[b"x-request-id"]) == (
        200,
        b"30",
        b"r",
    )
    assert (headers[b"content-length"], b"Content-Length" in headers) == (b"%d" % len(body), False)
    assert json.loads(body)["choices"] == [choices[1] | {"index": 0, "logprobs": None}]


def test_logprobs_that_the_client_asked_for_stay() -> None:
    for path, of, wish in ((CHAT, chat, True), (TEXT, text, 2)):
        app = App(json.dumps(answer_of(of(0, 9), of(1, 10), of(2, 9), total=28)).encode())
        asked = {"length_target": TEN, "logprobs": wish, "n": 2, "max_tokens": 50}
        _, _, body = post(app, asked | PROMPT[path], path)
        assert app.asked["logprobs"] == wish
        lengths = [choice["logprobs"] for choice in json.loads(body)["choices"]]
        assert lengths == [of(1, 10)["logprobs"], of(0, 9)["logprobs"]]


def test_an_error_goes_on_as_it_is() -> None:
    app = App(b'{"error": {"message": "no such model"}}', status=404)
    status, headers, body = post(app, {"length_target": TEN}, CHAT)
    assert (status, body, headers[b"content-length"]) == (404, app.body, b"39")
