"""The length of an answer before it is written: who is asked what, and what comes of it."""

import asyncio
import json
import math
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from lenvm_vllm.api.forecast import Forecast
from lenvm_vllm.api.middleware import PREDICTED, LengthTargetMiddleware
from lenvm_vllm.host import served
from lenvm_vllm.settings import Settings
from lenvm_vllm.target.request import LengthTarget
from tests.support.through import Keeper, chunk, send_through

CHAT = [{"role": "user", "content": "hi"}]
TEXT_PART = {"type": "text", "text": "hi"}
INPUT_PART = {"type": "input_text", "text": "hi"}


class Server:
    """Predicts `answer` tokens, or raises it, and keeps what it was asked."""

    def __init__(self, answer: Any = 120.4) -> None:
        self.answer = answer
        self.asked: list[Any] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(json.loads(request.content))
        if isinstance(self.answer, Exception):
            raise self.answer
        if isinstance(self.answer, int):
            return httpx.Response(self.answer, json={"error": {}})
        return httpx.Response(200, json={"predicted_tokens": self.answer})


DATE = 1_700_000_000  # seconds since 1970


class Clock:
    """now: seconds."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def forecast(server: Server, clock: Clock | None = None, **settings: Any) -> Forecast:
    clock = clock or Clock()
    transport = httpx.MockTransport(server)
    return Forecast(Settings(**settings), transport, clock, date=lambda: DATE + clock())


def tokens(made: Forecast, request: Any, shown: bool = False, **target: Any) -> int | None:
    goal = LengthTarget.parse(target) if target else None
    return asyncio.run(made.tokens(request, goal, shown))


@pytest.mark.parametrize(
    ("request_body", "asked"),
    [
        ({"messages": CHAT}, {"messages": CHAT}),
        ({"prompt": "once"}, {"prompt": "once"}),
        ({"prompt": [1, 2]}, {"token_ids": [1, 2]}),
        ({"prompt": ["once"]}, {"prompt": "once"}),
        ({"prompt": [[1, 2]]}, {"token_ids": [1, 2]}),
        ({"input": "hi"}, {"messages": CHAT}),
        (
            {"input": CHAT, "instructions": "Be kind."},
            {"messages": [{"role": "system", "content": "Be kind."}, *CHAT]},
        ),
        ({"messages": [{"role": "user", "content": [TEXT_PART]}]}, {"messages": CHAT}),
        ({"input": [{"role": "user", "content": [INPUT_PART]}]}, {"messages": CHAT}),
        (
            {"messages": CHAT, "system": [{"type": "text", "text": "Be kind."}]},
            {"messages": [{"role": "system", "content": "Be kind."}, *CHAT]},
        ),
        ({"token_ids": [1, 2], "sampling_params": {}}, {"token_ids": [1, 2]}),
    ],
)
def test_every_endpoint_is_asked_in_its_own_words(request_body, asked) -> None:
    server = Server()
    assert tokens(forecast(server), request_body) == 120
    assert server.asked == [asked]


def test_an_adapter_with_servers_of_its_own_is_asked_there() -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200, json={"predicted_tokens": 7})

    made = forecast(answer, url="http://a", adapters={"sql": "http://b/models/sql"})  # type: ignore[arg-type]
    for model in ("base", "sql", "other"):
        assert tokens(made, {"messages": CHAT, "model": model}) == 7
    assert asked == [
        "http://a/v1/predict",
        "http://b/models/sql/v1/predict",
        "http://a/v1/predict",
    ]


@pytest.mark.parametrize("trouble", [401, 404, 503])
def test_an_adapter_whose_own_do_not_answer_has_the_base_models(trouble: int) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        own = request.url.host == "b"
        return httpx.Response(trouble if own else 200, json={"predicted_tokens": 7})

    made = forecast(answer, url="http://a", adapters={"sql": "http://b,http://b/2"})  # type: ignore[arg-type]
    assert tokens(made, {"messages": CHAT, "model": "sql"}) == 7


@pytest.mark.parametrize(
    "request_body",
    [
        {},
        {"prompt": ["several", "texts"]},
        {"prompt": [[1], [2]]},
        {"prompt": []},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [7]},
    ],
)
def test_what_is_no_plain_text_is_not_asked(request_body) -> None:
    server = Server()
    assert tokens(forecast(server), request_body) is None
    assert not server.asked


def test_pictures_go_along_where_they_are_seen() -> None:
    server = Server()
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    asked = {"messages": [*CHAT, {"role": "user", "content": [TEXT_PART, picture]}]}
    assert tokens(forecast(server), asked) is None
    assert tokens(forecast(server), asked, shown=True) == 120
    assert server.asked == [asked]
    sound = {"type": "input_audio", "input_audio": {"data": "AAAA"}}
    asked["messages"].append({"role": "user", "content": [picture, sound]})
    assert tokens(forecast(server), asked, shown=True) is None


def test_a_slow_look_at_a_picture_silences_no_server() -> None:
    """But the next requests with pictures do not wait for it, too."""
    server, clock = Server(httpx.ReadTimeout("slow")), Clock()
    made = forecast(server, clock)
    assert tokens(made, {"messages": CHAT}, shown=True) is None
    server.answer = 80.0
    assert tokens(made, {"messages": CHAT}) == 80
    assert tokens(made, {"messages": CHAT}, shown=True) is None
    clock.now += 5
    assert tokens(made, {"messages": CHAT}, shown=True) == 80


@pytest.mark.parametrize(
    ("target", "natural", "expected"),
    [
        ({"tokens": 50}, 120.0, 50),
        ({"mode": "at_most", "tokens": 50}, 120.0, 50),
        ({"mode": "at_most", "tokens": 500}, 120.0, 120),
        ({"mode": "at_least", "tokens": 50}, 120.0, 120),
        ({"mode": "at_least", "tokens": 500}, 120.0, 500),
        ({"mode": "range", "min_tokens": 10, "max_tokens": 20}, 120.0, 20),
        ({"mode": "range", "min_tokens": 200, "max_tokens": 300}, 120.0, 200),
        ({"mode": "tilt", "beta": 1.0}, 120.0, 120),
        ({"tokens": 50, "scope": "answer"}, 120.0, 120),
        ({"tokens": 50}, 500, 50),
        ({"mode": "at_most", "tokens": 50}, 500, 50),
        ({"mode": "at_least", "tokens": 50}, 500, 50),
    ],
)
def test_a_target_bounds_it(target, natural, expected) -> None:
    assert tokens(forecast(Server(natural)), {"prompt": "x"}, **target) == expected


@pytest.mark.parametrize("trouble", [httpx.ConnectError("gone"), httpx.ReadTimeout("slow"), 503])
def test_a_server_in_trouble_is_left_alone_for_a_while(trouble) -> None:
    server, clock = Server(trouble), Clock()
    made = forecast(server, clock)
    assert [tokens(made, {"prompt": "x"}) for _ in range(3)] == [None] * 3
    assert len(server.asked) == 1
    server.answer, clock.now = 80.0, clock.now + 6
    assert tokens(made, {"prompt": "x"}) == 80


def test_a_refused_text_is_no_trouble() -> None:
    server = Server(400)
    made = forecast(server)
    assert tokens(made, {"prompt": "x"}) is None
    server.answer = 80.0
    assert tokens(made, {"prompt": "x"}) == 80


@pytest.mark.parametrize(
    "request_body", [{"prompt": "\ud800"}, {"messages": [CHAT[0] | {"name": math.nan}]}]
)
def test_what_cannot_be_sent_silences_no_server(request_body) -> None:
    made = forecast(Server(80.0))
    assert tokens(made, request_body) is None
    assert tokens(made, {"prompt": "x"}) == 80


def test_short_goes_first_and_long_does_not_wait_for_ever() -> None:
    clock = Clock()
    made = forecast(Server(), clock, aging=10.0)
    long, short = made.priority(1000), made.priority(20)
    assert short < long
    clock.now += 97
    assert made.priority(20) < long
    clock.now += 2
    assert made.priority(20) > long


def test_a_clients_own_priority_is_of_the_same_scale() -> None:
    """It moves a request by so many tokens, now as in an hour."""
    clock = Clock()
    made = forecast(Server(), clock, aging=10.0)
    for _ in range(2):
        plain = made.priority(50)
        assert made.priority(50, 0) == plain  # some clients always send it
        assert made.priority(50, 100) == made.priority(150) == plain + 100
        assert made.priority(50, -600) < plain
        clock.now += 60
        assert made.priority(50, -600) == plain  # came a minute later
        clock.now += 3600
    assert made.priority(50, 2**70) == 2**63 - 1
    assert made.priority(50, -(2**70)) >= -(2**63)


def test_all_api_servers_have_one_scale() -> None:
    early, late = forecast(Server()), Forecast(Settings(), date=lambda: DATE + Clock.now)
    assert early.priority(50) == late.priority(50) == 10 * (DATE + 1000) + 50


def test_what_is_not_known_counts_as_the_mean() -> None:
    made = forecast(Server(), aging=0.0)
    assert made.priority(None) == 0
    made.priority(100)
    made.priority(200)
    assert made.priority(None) == 110


def through(
    monkeypatch: pytest.MonkeyPatch, body: Any, path: str = "/v1/chat/completions", policy: str = ""
) -> tuple[Any, dict[bytes, bytes]]:
    """(body that reaches vLLM, response headers) of one request with the setting on."""
    config = SimpleNamespace(
        reasoning_config=None,
        additional_config={"lenvm": {"forecast": True, "aging": 0.0}},
        model_config=SimpleNamespace(max_model_len=1000, skip_tokenizer_init=True),
        scheduler_config=SimpleNamespace(policy=policy or "fcfs"),
        speculative_config=None,
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        parallel_config=SimpleNamespace(data_parallel_size=1, enable_batch_sharded_sampling=False),
    )
    monkeypatch.setattr(served, "config", config)
    keeper = Keeper()
    middleware = LengthTargetMiddleware(keeper)
    # The same, without a socket.
    monkeypatch.setattr(middleware, "_forecast", forecast(Server(), aging=0.0))
    message = chunk(json.dumps(body).encode())
    _, headers, _ = send_through(middleware, message, path=path)
    return json.loads(keeper.body), headers


def test_header_and_priority(monkeypatch) -> None:
    name = PREDICTED.encode()
    body, headers = through(monkeypatch, {"messages": CHAT}, policy="priority")
    assert (body["priority"], headers) == (120, {name: b"120"})
    body, headers = through(monkeypatch, {"messages": CHAT})
    assert "priority" not in body  # vLLM would refuse it
    assert headers[name] == b"120"
    _, headers = through(monkeypatch, {"prompt": "x"}, "/v1/completions")
    assert headers[name] == b"16"  # more it does not write unless the request says
    body, headers = through(
        monkeypatch, {"messages": CHAT, "max_tokens": 30, "priority": 7}, policy="priority"
    )
    assert (body["priority"], headers[name]) == (37, b"30")
    for wrong in ("high", None, 1.5):  # vLLM says so
        body, _ = through(monkeypatch, {"messages": CHAT, "priority": wrong}, policy="priority")
        assert body["priority"] == wrong
    prefill = {"kv_transfer_params": {"do_remote_decode": True}, "max_tokens": 1}
    body, _ = through(monkeypatch, {"messages": CHAT} | prefill, policy="priority")
    assert body["priority"] == 1
    body, headers = through(monkeypatch, {"items": ["x"]}, "/generative_scoring", "priority")
    assert (body["priority"], name in headers) == (1, False)
    body, headers = through(monkeypatch, {"messages": CHAT}, "/v1/messages/render", "priority")
    assert ("priority" in body, name in headers) == (False, False)
    asked = {"messages": CHAT, "length_target": 50}
    body, headers = through(monkeypatch, asked, policy="priority")
    assert (body["priority"], headers[name]) == (50, b"50")
    body, _ = through(monkeypatch, {"messages": CHAT}, "/v1/messages", "priority")
    assert "priority" not in body  # Anthropic's requests have none
    body, headers = through(monkeypatch, [1], policy="priority")
    assert (body, name in headers) == ([1], False)
