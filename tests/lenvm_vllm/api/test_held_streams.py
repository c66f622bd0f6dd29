"""Streams whose end is written again: what is held back and what follows; nothing is lost."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from lenvm_vllm.api.held_streams import HOLD
from lenvm_vllm.api.middleware import LengthTargetMiddleware
from lenvm_vllm.api.routes import CHAT, TEXT
from lenvm_vllm.telemetry.metrics import exposition
from tests.support.engine_side import BAD, EOS, Tokenizer, Told, round_of, serve
from tests.support.streaming import DONE, KEEP_ALIVE, Heard, Streaming, usage_of
from tests.support.through import chunk

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}]}
ASK: dict[str, dict[str, Any]] = {CHAT: HELLO, TEXT: {"prompt": "?", "max_tokens": 500}}
FIRST = Told(100, BAD)
KEPT = 100 - HOLD  # tokens of it that are sent before its end is known, or one less
ENDINGS = round_of((111, 0.5), (100, BAD), (101, 0.5), (103, 0.5), cut=KEPT - 1)


@pytest.fixture(autouse=True)
def _served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LENVM_ENDINGS_PATIENCE", "LENVM_ENDINGS_PAUSE_S"):
        monkeypatch.setenv(name, "1000")
    serve(monkeypatch, tmp_path)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_good_end_is_what_it_is_without_holding(path: str, size: int) -> None:
    for first in (Told(102), Told(101, BAD, ".", forced=True), Told(91), Told(110)):
        held, free = (
            Streaming(first, size=size).answer(
                ASK[path] | {"length_target": {"tokens": 100} | endings}, path
            )
            for endings in ({}, {"endings": 1})
        )
        told = free.body.replace(b',"endings":1}', b"}")
        assert held.body == told
        assert held.body.endswith(DONE)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_bad_one_goes_on_with_the_first_good_one_of_its_endings(path: str, size: int) -> None:
    app = Streaming(FIRST, ENDINGS, size=size)
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {"length_target": 100, "return_token_ids": True, "stream_options": options}
    heard = app.answer(ASK[path] | asked, path)
    (_, wish) = app.asked[1]
    cut = len(wish["prompt"]) - 2
    assert cut == KEPT - 1
    assert (wish["n"], wish["stream"], "stream_options" in wish) == (4, True, False)
    before = Heard(app.before[0])
    assert before.ids == [97] * cut  # what the client has is what is continued
    assert before.text == "a" * cut
    assert heard.text == "a" * cut + "d" * (100 - cut)
    assert heard.ids == [97] * cut + [100] * (100 - cut) + [EOS]
    assert heard.body.startswith(app.before[0])
    assert heard.body.endswith(DONE)
    assert heard.choices[-1]["finish_reason"] == "stop"
    assert heard.chunks[-2]["usage"] == heard.chunks[-1]["usage"] == usage_of(101)
    assert heard.result["endings"] == 5
    assert heard.result["sampled_tokens"] == 100 + sum(told.length for told in ENDINGS)
    assert (heard.result["tokens"], heard.result["end"]) == (101, "natural")
    assert [choice for choice in heard.choices if "length_result" in choice] == [heard.choices[-1]]


def test_a_limit() -> None:
    first, target = Told(100, BAD, forced=True), {"mode": "at_most", "tokens": 100}
    app = Streaming(first, round_of((94, 0.5), cut=KEPT - 1))
    heard = app.answer(HELLO | {"length_target": target})
    assert heard.text == "a" * (KEPT - 1) + "b" * (94 - KEPT)


def test_ids_that_nobody_asked_for_stay_hidden() -> None:
    heard = Streaming(FIRST, ENDINGS).answer(HELLO | {"length_target": 100})
    assert (heard.ids, heard.text[-1]) == ([], "d")
    assert all(chunk.get("prompt_token_ids") is None for chunk in heard.chunks)


def test_no_better_ending_leaves_the_first() -> None:
    worse = round_of(*[(60, BAD)] * 4, cut=KEPT - 1)
    app = Streaming(FIRST, worse, worse[:3])
    heard = app.answer(HELLO | {"length_target": 100})
    assert (heard.text, heard.result["endings"]) == ("a" * 99, 8)
    cuts = [len(wish["prompt"]) - 2 for _, wish in app.asked[1:]]
    assert cuts == [KEPT - 1] * 2  # no round begins before what the client has


@pytest.mark.parametrize("fields", [{"n": 2}, {"temperature": 0}, {"logprobs": True}])
def test_what_rules_other_endings_out_holds_nothing(fields: dict[str, Any]) -> None:
    app = Streaming(FIRST, more={95: KEEP_ALIVE})
    heard = app.answer(HELLO | {"length_target": 100} | fields)
    assert len(app.asked) == 1
    assert heard.text[:94] == Heard(heard.body.split(KEEP_ALIVE)[0]).text


@pytest.mark.parametrize("name", ["LENVM_ENDINGS_PAUSE_S", "LENVM_ENDINGS_PATIENCE"])
def test_no_pause_is_no_other_ending(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "0")
    app = Streaming(FIRST, more={95: KEEP_ALIVE})
    heard = app.answer(HELLO | {"length_target": 100})
    assert len(Heard(heard.body.split(KEEP_ALIVE)[0]).text) == 94
    assert len(app.asked) == 1


def test_without_rails_nothing_is_held() -> None:
    app = Streaming(Told(101), more={95: KEEP_ALIVE})
    target = {"tokens": 100, "tolerance": None, "endings": 8}
    heard = app.answer(HELLO | {"length_target": target})
    assert len(Heard(heard.body.split(KEEP_ALIVE)[0]).text) == 94
    assert len(app.asked) == 1


def test_a_text_that_vllm_gave_up_stays() -> None:
    app = Streaming(Told(60, BAD, finish="abort"))
    heard = app.answer(HELLO | {"length_target": 100})
    assert (len(app.asked), heard.choices[-1]["finish_reason"]) == (1, "abort")


def test_an_end_that_is_replaced_takes_its_reason_along() -> None:
    """One of a model's several ends has its number there."""
    app = Streaming(Told(100, BAD, stop_reason=7), ENDINGS)
    assert app.answer(HELLO | {"length_target": 100}).choices[-1]["stop_reason"] is None


def test_what_keeps_a_connection_is_not_held() -> None:
    app = Streaming(Told(100), more={100: KEEP_ALIVE})
    heard = app.answer(HELLO | {"length_target": 100})
    before, behind = heard.body.split(KEEP_ALIVE)
    assert len(Heard(before).text) + len(Heard(behind).text) == 99
    assert len(Heard(before).text) == KEPT - 1


def test_an_error_comes_behind_what_is_held() -> None:
    error = b'data: {"error": {"message": "gone", "code": 500}}\n\n'
    app = Streaming(FIRST, more={98: error})
    heard = app.answer(HELLO | {"length_target": 100})
    assert len(Heard(heard.body.split(error)[0]).text) == 97


def test_what_is_no_text_alone_has_one_ending() -> None:
    """Some of its tokens are a thinking, which is not in its content."""
    app = Streaming(Told(100, BAD, content="b" * 99))
    heard = app.answer(HELLO | {"length_target": 100})
    assert (heard.text, len(app.asked)) == ("b" * 99, 1)


def test_an_ending_that_would_change_what_was_sent_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer may write a token otherwise before another one."""

    class Joining(Tokenizer):
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return super().decode(ids, skip_special_tokens).replace("ad", "Ad")

    monkeypatch.setattr("lenvm_vllm.api.middleware.tokenizer_of", lambda config: Joining())
    heard = Streaming(FIRST, ENDINGS).answer(HELLO | {"length_target": 100})
    assert heard.text == "a" * (KEPT - 1) + "e" * (103 - KEPT)


class Failing(Streaming):
    async def _say(self, send: Any, body: bytes) -> None:
        if b'"finish_reason": "stop"' in body:
            raise RuntimeError("the engine is gone")
        await super()._say(send, body)


def test_what_is_held_is_sent_where_vllm_fails() -> None:
    app = Failing(FIRST)
    with pytest.raises(RuntimeError, match="the engine is gone"):
        app.answer(HELLO | {"length_target": 100})
    assert len(Heard(b"".join(app.sent)).text) == 99


class Slow(Streaming):
    """Never done with a round, until its client hangs up."""

    left = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self.asked:
            await super().__call__(scope, receive, send)
            return
        await receive()
        self.asked.append((scope["path"], None))
        assert (await receive())["type"] == "http.disconnect"
        self.left = True


def test_a_round_that_takes_too_long_leaves_the_first_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENVM_ENDINGS_PAUSE_S", "0.05")
    app = Slow(FIRST)
    heard = app.answer(HELLO | {"length_target": 100})
    assert (heard.text, len(app.asked)) == ("a" * 99, 2)
    lines = dict(line.split() for line in exposition().decode().splitlines() if line[0] != "#")
    assert lines["lenvm_stream_pauses_total"] == "1.0"
    assert 0.04 < float(lines["lenvm_stream_pause_seconds_total"]) < 100


def test_a_client_who_hangs_up_ends_the_round() -> None:
    """vLLM's own answer ends then, and with it the round that its end waits for."""
    app = Slow(FIRST)

    async def run() -> None:
        async def receive() -> Any:
            return asked.pop() if asked else await asyncio.Event().wait()

        async def send(message: Any) -> None: ...

        asked = [chunk(json.dumps(HELLO | {"length_target": 100, "stream": True}).encode())]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        answering = asyncio.ensure_future(LengthTargetMiddleware(app)(scope, receive, send))
        while len(app.asked) < 2:
            await asyncio.sleep(0.01)
        answering.cancel()
        while not app.left:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 60))


class Unfinished(Streaming):
    """Of a round one ending is there, and the others only come when its client hangs up."""

    left = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def say(message: Any) -> None:
            await send(message | {"more_body": True} if "body" in message else message)

        again = bool(self.asked)
        await super().__call__(scope, receive, say if again else send)
        if again:
            self.left = (await receive())["type"] == "http.disconnect"


def test_a_round_ends_with_its_first_good_ending() -> None:
    app = Unfinished(FIRST, round_of((101, 0.5), cut=KEPT - 1))
    heard = app.answer(HELLO | {"length_target": 100})
    assert (heard.text, app.left) == ("a" * (KEPT - 1) + "b" * (101 - KEPT), True)
    assert heard.result["endings"] == 2
