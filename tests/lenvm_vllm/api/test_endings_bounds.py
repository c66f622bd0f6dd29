"""What bounds other endings: vLLM's queue, time, rounds at a time, and the set-up."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lenvm_vllm.api.asgi import replay
from lenvm_vllm.api.endings import TAIL
from lenvm_vllm.api.middleware import LengthTargetMiddleware
from lenvm_vllm.api.outcome import Report
from lenvm_vllm.api.rounds import Round
from lenvm_vllm.api.routes import CHAT
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.telemetry.metrics import exposition
from lenvm_vllm.telemetry.progress import Known
from tests.support.engine_side import BAD, EVENTS, App, Told, content_of, round_of, serve
from tests.support.streaming import Streaming, events_of
from tests.support.through import chunk, post_to

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}]}


@pytest.fixture(autouse=True)
def engine_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    return serve(monkeypatch, tmp_path)


def post(app: App, length_target: Any) -> Any:
    return post_to(app, HELLO | {"length_target": length_target})[2]


def test_while_requests_wait_no_round_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = iter([0.0, 0.0, 3.0])  # before a place in the line, and in it
    monkeypatch.setattr("lenvm_vllm.api.middleware.waiting_requests", lambda: next(waiting))
    app = App([Told(100, BAD)], round_of(*[(TAIL, BAD)] * 4))
    post(app, {"tokens": 100, "endings": 16})
    assert len(app.asked) == 2


class Slow(App):
    """Never done with a round of endings."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.asked:
            self.asked.append((scope["path"], None))
            await asyncio.Event().wait()
        await asyncio.sleep(0.01)
        await super().__call__(scope, receive, send)


class Broken(App):
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.asked:
            self.asked.append((scope["path"], None))
            raise RuntimeError("the engine is gone")
        await super().__call__(scope, receive, send)


@pytest.mark.parametrize("kind", [Slow, Broken])
def test_rounds_that_take_too_long_or_fail_leave_the_first_answer(kind: Any) -> None:
    app = kind([Told(100, BAD)])
    answer = post(app, 100)
    assert (content_of(answer["choices"][0]), len(app.asked)) == ("a" * 99, 2)


def test_a_refused_round_leaves_the_answer() -> None:
    app = App([Told(100, BAD)], round_of((TAIL, 0.5)), status=500)
    answer = post(app, 100)
    (choice,) = answer["choices"]
    assert (content_of(choice), choice["length_result"]["sampled_tokens"]) == ("a" * 99, 100)


class Shared(App):
    """Answers any number of requests: first texts that end badly, and good endings of them."""

    running = most = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = json.loads((await receive())["body"])
        again = "length_prefix_tokens" in request["vllm_xargs"] and "n" in request
        self.running += again
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.01)
        self.rounds.append(round_of(*[(TAIL, 0.5)] * 4) if again else [Told(100, BAD)])
        message = chunk(json.dumps(request).encode())
        await super().__call__(scope, replay([message], receive), send)
        self.running -= again


def test_so_many_rounds_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENVM_ENDINGS_AT_ONCE", "2")
    monkeypatch.setenv("LENVM_ENDINGS_PATIENCE", "1000")
    app = Shared()
    middleware = LengthTargetMiddleware(app)

    async def request() -> None:
        async def receive() -> Any:
            return chunk(json.dumps(HELLO | {"length_target": 100}).encode())

        async def send(message: Any) -> None: ...

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        await middleware(scope, receive, send)

    async def six() -> None:
        await asyncio.gather(*[request() for _ in range(6)])

    asyncio.run(six())
    assert (len(app.asked), app.most) == (12, 2)


@pytest.mark.parametrize("is_stream", [True, False])
def test_no_stream_stands_in_line_and_nothing_while_vllm_is_full(
    monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    full = asyncio.Semaphore(0)
    monkeypatch.setattr("lenvm_vllm.api.middleware.asyncio.Semaphore", lambda at_once: full)
    monkeypatch.setattr("lenvm_vllm.api.middleware.waiting_requests", lambda: 1.0 - is_stream)
    monkeypatch.setenv("LENVM_ENDINGS_PATIENCE", "1e6")
    if is_stream:
        Streaming(Told(100, BAD)).answer(HELLO | {"length_target": 100})
    else:
        post(App([Told(100, BAD)]), 100)
    lines = dict(line.split() for line in exposition().decode().splitlines() if line[0] != "#")
    assert float(lines.get("lenvm_ending_seconds_total", 0)) < 60
    assert float(lines.get("lenvm_stream_pauses_total", 0)) == 0


@pytest.mark.parametrize("is_over", [True, False])
def test_what_comes_when_a_round_is_over_is_left_out(is_over: bool) -> None:
    taken = []
    report = Report(LengthTarget.parse(100), Known(), "a")
    heard = Round(report, lambda ids, outcome: bool(taken.append(ids)))

    async def hear() -> None:
        await heard({"type": "http.response.start", "status": 200, "headers": [EVENTS]})
        if is_over:
            heard.enough.set()
        for event in events_of(CHAT, {}, Told(20)):
            await heard({"type": "http.response.body", "body": event, "more_body": True})

    asyncio.run(hear())
    assert len(taken) == 1 - is_over


def test_what_they_cost_is_counted() -> None:
    app = App([Told(100, BAD)], round_of(*[(TAIL, 0.5)] * 4))
    post(app, 100)
    lines = exposition().decode().splitlines()
    for name, value in ("endings", 4.0), ("ending_rounds", 1.0), ("ending_tokens", 4.0 * TAIL):
        assert f"lenvm_{name}_total {value}" in lines


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("cache_config", "enable_prefix_caching", False),
        ("parallel_config", "data_parallel_size", 2),
    ],
)
def test_where_they_would_cost_more_there_are_none_by_default(
    part: str, name: str, value: Any, engine_config: SimpleNamespace
) -> None:
    setattr(getattr(engine_config, part), name, value)
    for target, rounds in (({"tokens": 100}, 0), ({"tokens": 100, "endings": 5}, 1)):
        app = App([Told(100, BAD)], round_of(*[(TAIL, 0.5)] * 4))
        post(app, target)
        assert len(app.asked) == 1 + rounds


def test_rails_that_are_off_stay_off() -> None:
    app = App([Told(100, BAD)])
    post(app, {"tokens": 100, "tolerance": None})
    assert len(app.asked) == 1


class Refusing(App):
    """Refuses all rounds, as vLLM does where one field of them is wrong."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self.asked:
            await super().__call__(scope, receive, send)
            return
        self.asked.append((scope["path"], None))
        await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


@pytest.mark.parametrize("policy", ["project", "landing", "rails"])
def test_a_round_without_an_ending_is_the_last(
    monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    monkeypatch.setenv("LENVM_ENDINGS_PATIENCE", "1000")
    app = Refusing([Told(100, BAD)])
    post(app, {"tokens": 100, "policy": policy})
    assert len(app.asked) == 2
