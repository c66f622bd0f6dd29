"""What a client is told of a guided answer, in the form of each route, streaming or not."""

import json
import math
import uuid
from pathlib import Path
from typing import Any

import pytest

from lenvm_vllm.api.answers import Answers
from lenvm_vllm.api.asgi import Upstream, replay
from lenvm_vllm.api.routes import CHAT, RESPONSES, TEXT, streams
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.telemetry.metrics import FOLDER
from lenvm_vllm.telemetry.progress import KEY, VALUED, Known, Progress
from tests.support.engine_side import App, Told, tell
from tests.support.through import chunk, send_through

TARGET = LengthTarget(tokens=10)
CUT = Told(11, 0.01, forced=True)


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))


class Saying:
    """Answers with `parts`, as a stream or not, and tells of the texts in `told`."""

    def __init__(self, kind: bytes, parts: list[bytes], *told: Told) -> None:
        self.kind, self.parts, self.told = kind, parts, told
        self.engine = Progress()
        self.asked: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked = json.loads((await receive())["body"]) or self.asked
        for told in self.told:
            tell(self.engine, self.asked["vllm_xargs"][KEY], told)
        headers = [(b"content-type", self.kind)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def ask(
    app: Any, path: str, predicted: int | None = None, every: int = 16, **request: Any
) -> bytes:
    answers = Answers(TARGET.model_copy(update={"progress": every}), Known(), predicted)

    async def respond(scope: Any, receive: Any, send: Any) -> None:
        asked = {"vllm_xargs": TARGET.to_xargs()} | request
        await answers.respond(Upstream(app, scope, receive), asked, send)

    return send_through(respond, path=path)[2]


def test_what_a_result_says() -> None:
    answer = json.loads(ask(App([CUT]), CHAT, predicted=250))
    assert answer["choices"][0]["length_result"] == {
        "target": {"mode": "equal_to", "tokens": 10},
        "tokens": 11,
        "words": 1,
        "characters": 10,
        "end": "cut",
        "forced": True,
        "passed_rail": False,
        "steps": 11,
        "steered_steps": 10,
        "endings": 1,
        "sampled_tokens": 11,
        "predicted_tokens": 250,
    }


def test_a_result_says_that_pictures_were_not_seen() -> None:
    answer = json.loads(ask(App([Told(11, unseen=True)]), CHAT))
    assert answer["choices"][0]["length_result"]["unseen"] is True


def test_each_choice_has_its_own() -> None:
    texts = CUT, Told(10, letter="b"), Told(12, 0.01, content="It is whole.")
    answer = json.loads(ask(App(texts), CHAT, n=3))
    ends = [choice["length_result"]["end"] for choice in answer["choices"]]
    reasons = [choice["finish_reason"] for choice in answer["choices"]]
    assert (ends, reasons) == (["cut", "natural", "whole"], ["length", "stop", "stop"])


@pytest.mark.parametrize(("prompt", "n"), [("a b", 2), (["a b"], 2), (["a b", "a"], 1)])
def test_an_echo_is_not_counted(prompt: Any, n: int) -> None:
    texts = [Told(4, content="a b three"), Told(4, content="a b c d" if n == 2 else "a c d")]
    answer = json.loads(ask(App(texts), TEXT, echo=True, prompt=prompt, n=n))
    assert [choice["length_result"]["words"] for choice in answer["choices"]] == [1, 2]


def test_an_echo_keeps_its_prompt() -> None:
    """With token ids vLLM would leave the prompt out of the text."""
    app = App([CUT])
    ask(app, "/v1/completions", echo=True)
    assert "return_token_ids" not in app.asked[0][1]


def response(status: str = "completed") -> dict[str, Any]:
    output = [{"type": "message", "content": [{"type": "output_text", "text": "a" * 10}]}]
    return {
        "object": "response",
        "status": status,
        "output": output,
        "usage": {"output_tokens": 11},
        "incomplete_details": None,
    }


def test_responses_have_a_status_instead() -> None:
    app = Saying(b"application/json", [json.dumps(response()).encode()], CUT)
    answer = json.loads(ask(app, "/v1/responses"))
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["length_result"]["end"] == "cut"
    assert "return_token_ids" not in app.asked


def message(**fields: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": "It is over."}]
    whole = {"type": "message", "content": content, "usage": {"output_tokens": 11}}
    return whole | {"stop_reason": "end_turn"} | fields


@pytest.mark.parametrize(
    ("fields", "reason", "end"),
    [
        ({}, "end_turn", "whole"),
        ({"content": [{"type": "text", "text": "It is"}]}, "max_tokens", "cut"),
        ({"stop_reason": "stop_sequence"}, "stop_sequence", "natural"),
    ],
)
def test_messages_have_a_stop_reason(fields: dict[str, Any], reason: str, end: str) -> None:
    app = Saying(b"application/json", [json.dumps(message(**fields)).encode()], CUT)
    answer = json.loads(ask(app, "/v1/messages"))
    assert (answer["stop_reason"], answer["length_result"]["end"]) == (reason, end)


def events(*chunks: Any, name: bool = False) -> list[bytes]:
    """As vLLM writes them."""
    return [
        (f"event: {chunk['type']}\n" if name else "").encode()
        + f"data: {json.dumps(chunk)}\n\n".encode()
        for chunk in chunks
    ]


def part(ids: list[int], delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "token_ids": ids}
    return {"id": "r", "choices": [choice]}


def stream(told: Told) -> list[bytes]:
    first = part([], {"role": "assistant", "content": ""}) | {"prompt_token_ids": [65, 66]}
    body = [part([i], {"content": told.letter}) for i in told.ids[:-1]]
    hidden = part([], {})  # a control token, of which vLLM says nothing without token ids
    last = part([0], {"content": ""}, told.finish)
    return [*events(first, *body, hidden, last), b"data: [DONE]\n\n"]


def choices_of(body: bytes) -> list[Any]:
    parts = body.decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: "))["choices"][0] for part in parts[:-2]]


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_the_last_chunk_of_a_stream_tells_it(size: int) -> None:
    whole = b"".join(stream(CUT))
    parts = [whole[at : at + size] for at in range(0, len(whole), size)]
    app = Saying(b"text/event-stream; charset=utf-8", parts, CUT)
    body = ask(app, CHAT, stream=True)
    *others, last = choices_of(body)
    assert "".join(choice["delta"]["content"] for choice in others) == "a" * 10
    assert all(choice["token_ids"] is None for choice in (*others, last))
    assert all("length_result" not in choice for choice in others)
    assert (last["finish_reason"], last["length_result"]["end"]) == ("length", "cut")
    assert json.loads(body.split(b"\n\n")[0].removeprefix(b"data: "))["prompt_token_ids"] is None


@pytest.mark.parametrize(("every", "where"), [(16, []), (11, []), (4, [4, 8]), (0, [])])
def test_a_stream_tells_how_far_it_is(every: int, where: list[int]) -> None:
    """Of eleven tokens the last one has the result instead. What is no length is not told."""

    class Running(Saying):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            self.asked = json.loads((await receive())["body"])
            row = self.engine.open(self.asked["vllm_xargs"][KEY])
            for index in range(11):
                self.engine.tell(
                    rows=[row or 0],
                    index=[index],
                    counted=[index + 1],
                    token=[97 if index else -1],
                    p_end=[math.nan],
                    expected=[math.inf if index == 7 else 100.0 - index],
                    flags=[VALUED],
                    steps=[index + 1],
                    steered=[index + 1],
                )
            await super().__call__(scope, replay([chunk(b"{}")], receive), send)

    app = Running(b"text/event-stream", stream(CUT))
    choices = choices_of(ask(app, CHAT, stream=True, every=every))
    told = [choice["length_progress"] for choice in choices if "length_progress" in choice]
    expected = {n: None if n == 8 else 101.0 - n for n in where}
    assert told == [{"tokens": n, "expected": expected[n], "p_end": None} for n in where]


def test_token_ids_that_the_client_asked_for_stay() -> None:
    app = Saying(b"text/event-stream", stream(Told(10)), Told(10))
    choices = choices_of(ask(app, CHAT, stream=True, return_token_ids=True))
    assert [i for choice in choices for i in choice["token_ids"]] == Told(10).ids
    assert choices[-1]["length_result"]["end"] == "natural"
    assert {} in [choice["delta"] for choice in choices]


def test_logprobs_of_a_token_that_shows_nothing_stay() -> None:
    """vLLM has a chunk for those of a marker."""
    hidden = part([7], {})
    hidden["choices"][0]["logprobs"] = {"content": [{"token": "</think>", "logprob": -0.1}]}
    parts = [*events(hidden), *stream(CUT)]
    first = choices_of(ask(Saying(b"text/event-stream", parts, CUT), CHAT, stream=True))[0]
    assert first["logprobs"] == hidden["choices"][0]["logprobs"]
    assert first["token_ids"] is None


@pytest.mark.parametrize(
    ("said", "whether"), [(1, True), ("true", True), ("no", False), (2, False)]
)
def test_a_stream_is_what_vllm_takes_for_one(said: Any, whether: bool) -> None:
    assert streams({"stream": said}) is whether
    if whether:
        app = Saying(b"text/event-stream", stream(CUT), CUT)
        assert choices_of(ask(app, CHAT, stream=said))[-1]["length_result"]["end"] == "cut"


def test_a_stream_whose_tokens_are_hidden() -> None:
    """A thinking that the client does not want to see takes its token ids along."""
    parts = [part.replace(b'"token_ids": [', b'"hidden": [') for part in stream(CUT)]
    last = choices_of(ask(Saying(b"text/event-stream", parts, CUT), CHAT, stream=True))[-1]
    assert (last["length_result"]["end"], last["length_result"]["tokens"]) == ("cut", 11)


def test_streams_of_the_other_routes() -> None:
    delta = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "It is"}}
    end = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}
    end |= {"usage": {"output_tokens": 11}}
    app = Saying(b"text/event-stream", events(delta, end, name=True), CUT)
    first, last, _ = ask(app, "/v1/messages", stream=True).decode().split("\n\n")
    assert first.encode() + b"\n\n" == events(delta, name=True)[0]
    told = json.loads(last.split("data: ")[1])
    assert told["delta"] == {"stop_reason": "max_tokens"}
    assert told["length_result"]["end"] == "cut"

    end = {"type": "response.completed", "response": response()}
    app = Saying(b"text/event-stream", events(end, name=True), CUT)
    (last, _) = ask(app, "/v1/responses", stream=True).decode().split("\n\n")
    assert last.startswith("event: response.incomplete\ndata: ")
    told = json.loads(last.split("data: ")[1])
    assert (told["type"], told["response"]["status"]) == ("response.incomplete", "incomplete")
    assert told["response"]["length_result"]["forced"] is True


SAYS = 'data: {"a": 1}'  # a text that looks like an event


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (CHAT, part([97], {"content": SAYS})),
        (CHAT, part([97], {"content": "a"}) | {"prompt_text": SAYS}),
        (TEXT, {"id": "r", "choices": [{"index": 0, "finish_reason": None, "text": SAYS}]}),
        (RESPONSES, {"type": "response.output_text.done", "text": SAYS}),
    ],
)
def test_a_text_may_look_like_an_event(path: str, said: Any) -> None:
    app = Saying(b"text/event-stream", events(said, name="type" in said))
    told = ask(app, path, stream=True, return_token_ids=True).removesuffix(b"\n\n")
    assert json.loads(told.split(b"data: ", 1)[1]) == said


def test_an_engine_elsewhere_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER)
    (choice,) = json.loads(ask(App([CUT]), CHAT))["choices"]
    assert choice["finish_reason"] == "stop"
    told = choice["length_result"]
    assert (told["tokens"], told["end"], told["forced"]) == (11, None, None)


def test_keys_are_not_guessed() -> None:
    app = App([CUT])
    ask(app, CHAT)
    assert uuid.UUID(hex=app.asked[0][1]["vllm_xargs"][KEY]).version == 4
