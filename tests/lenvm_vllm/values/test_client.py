"""The client of the value server: every failure is one of ours, and is not asked for at once."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import torch

from lenvm_vllm.values.client import (
    BadReply,
    CircuitOpen,
    Mismatch,
    Refused,
    TimedOut,
    Unreachable,
    ValueClient,
    ValueServerError,
)
from value_server.contract import wire

FINGERPRINT = "f" * 64
INFO = wire.ModelInfo(
    gamma=0.99,
    base_model="tiny",
    tokenizer_fingerprint=FINGERPRINT,
    vocab_size=16,
    max_position=64,
    max_sessions=4,
    max_candidates=8,
)
STEP = wire.StepRequest(
    sessions=["a", "b"],
    starts=[0, 3],
    token_counts=[2, 0],
    tokens=wire.pack_ids([5, 6]),
    candidate_counts=[2, 1],
    candidates=wire.pack_ids([7, 8, 9]),
    closed=["c"],
)
Z = np.array([1.5, -2.0, 0.0], dtype=np.float32)


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


class Server:
    """Answers every request with the next of `answers` (the last one for ever) and counts."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, content=answer)


def connect(server: Server, **options: Any) -> ValueClient:
    return ValueClient("http://values", transport=httpx.MockTransport(server), **options)


def reply(z: Any = Z, **fields: Any) -> bytes:
    told = {"held": [2, 3]} | fields
    return wire.encode(wire.StepReply(logits=wire.pack_logits(np.float32(z)), **told))


def info(**changes: Any) -> bytes:
    return msgspec.json.encode(msgspec.structs.replace(INFO, **changes))


def ours() -> str:
    return FINGERPRINT


def test_step() -> None:
    server = Server(reply([1.5, -2.0, np.nan], held=[2, 0], refused={1: "too long"}))
    told = connect(server, token="secret").step(STEP)
    np.testing.assert_array_equal(wire.unpack_logits(told.logits), np.float32([1.5, -2.0, np.nan]))
    assert (told.held, told.refused) == ([2, 0], {1: "too long"})
    (request,) = server.requests
    assert (request.method, request.url.path) == ("POST", wire.STEP_PATH)
    assert request.headers["Authorization"] == "Bearer secret"
    assert wire.decode_request(request.content) == STEP


def test_model_is_asked_for_once() -> None:
    server = Server(info())
    client = connect(server)
    assert client.model(ours) == client.model(ours) == INFO
    assert client.model(lambda: None) == INFO
    assert [request.url.path for request in server.requests] == [wire.MODEL_PATH]
    assert "Authorization" not in server.requests[0].headers


def test_no_tokenizer_to_compare() -> None:
    assert connect(Server(info())).model(lambda: None) == INFO


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (info(version=wire.WIRE_VERSION + 1), Mismatch, "version: the server speaks"),
        (info(tokenizer_fingerprint="e" * 64), Mismatch, "with eeeeeeeeeeee, vLLM serves ffffffff"),
        (b"{}", BadReply, "missing required field"),
        (info(gamma=1.0), BadReply, "gamma"),  # the first one told stays the client's own
        (info(vocab_size=0), BadReply, "vocab_size"),
        (b"\xff\x00", BadReply, None),
        (b"<html>", BadReply, None),
        (httpx.Response(401, text="no token"), Refused, "/v1/model: HTTP 401 no token"),
    ],
)
def test_model_errors(answer: Any, error: type[Exception], message: str | None) -> None:
    with pytest.raises(error, match=message):
        connect(Server(answer)).model(ours)


ASKS_QUERIES = msgspec.structs.replace(STEP, lookahead_rank=1)


def test_queries() -> None:
    told = wire.pack_logits(np.float32([1, 2, np.nan, np.nan]))
    answer = connect(Server(reply(queries=told))).step(ASKS_QUERIES)
    np.testing.assert_array_equal(wire.unpack_queries(answer.queries, 1)[0], [1, 2])


@pytest.mark.parametrize("numbers", [[], [1, 2], [1, 2, 3, np.inf], [1, 2, 3, np.nan]])
def test_wrong_queries(numbers: list[float]) -> None:
    with pytest.raises(BadReply, match="queries"):
        connect(Server(reply(queries=wire.pack_logits(np.float32(numbers))))).step(ASKS_QUERIES)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (httpx.ConnectError("refused"), Unreachable),
        (httpx.ReadError("reset"), Unreachable),
        (httpx.RemoteProtocolError("half an answer"), Unreachable),
        (ConnectionResetError("reset"), Unreachable),
        (httpx.ConnectTimeout("slow"), TimedOut),
        (httpx.ReadTimeout("slow"), TimedOut),
        (httpx.PoolTimeout("slow"), TimedOut),
        (httpx.DecodingError("gzip"), BadReply),
        (httpx.Response(500, text="boom"), Refused),
        (httpx.Response(302, headers={"Location": "http://other"}), Refused),
        (httpx.Response(204), Refused),
        (b"", BadReply),
        (b"\xc1\xff", BadReply),
        (reply()[:-3], BadReply),
        (reply(Z[:2]), BadReply),
        (reply(version=wire.WIRE_VERSION + 1), BadReply),
        (reply(held=[2]), BadReply),
        (reply(held=[3, 3]), BadReply),
        (reply(held=[2, -1]), BadReply),
        (reply(refused={2: "too long"}), BadReply),
        (reply(refused={-1: "too long"}), BadReply),
        (reply([1.5, np.nan, 0.0]), BadReply),
        (reply([1.5, np.inf, np.nan]), BadReply),
        (reply() + bytes(10_000), BadReply),
        (msgspec.msgpack.encode({"version": 1, "logits": "text"}), BadReply),
        (msgspec.msgpack.encode([1, 2]), BadReply),
    ],
)
def test_step_errors(answer: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        connect(Server(answer)).step(STEP)
    assert type(raised.value) is error
    assert isinstance(raised.value, ValueServerError)


# ---- the keys of a lookahead head

AHEAD = msgspec.structs.replace(INFO, model_id="m", lookahead_rank=3)
K = np.arange(AHEAD.vocab_size * 3, dtype=np.float16).reshape(-1, 3) / 8


def keys(data: Any = K, **fields: Any) -> bytes:
    told = {"model_id": "m", "rank": 3, "keys": wire.pack_keys(data)} | fields
    return wire.encode(wire.LookaheadKeys(**told))


def test_keys_are_asked_for_once_per_model() -> None:
    clock, other = Clock(), msgspec.structs.replace(AHEAD, model_id="n")
    server = Server(keys(), httpx.ReadTimeout("slow"), keys(2 * K, model_id="n"))
    client = connect(server, clock=clock, backoff_s=(1.0, 1.0))
    first = client.keys(AHEAD)
    failing(lambda: client.step(STEP), TimedOut)  # it was started anew
    clock.time = 1.0
    assert client.keys(AHEAD) is first
    assert len(server.requests) == 2
    second = client.keys(other)
    assert second is client.keys(other)
    paths = [request.url.path for request in server.requests]
    assert paths == [wire.KEYS_PATH, wire.STEP_PATH, wire.KEYS_PATH]
    query, tokens = torch.tensor([[0.5, 1.0, -2.0, 3.0]]), torch.tensor([[0, 7, 15]])
    expected = [0.5 + float(K[t].astype(float) @ [1, -2, 3]) for t in (0, 7, 15)]
    assert first.after(query, tokens).tolist() == [pytest.approx(expected)]
    assert second.after(query, tokens).tolist() == [pytest.approx([2 * z - 0.5 for z in expected])]


def test_a_text_without_a_query_has_no_values() -> None:
    found = connect(Server(keys())).keys(AHEAD)
    queries = torch.tensor([[0.0] * 4, [np.nan] * 4])
    after = found.after(queries, torch.tensor([[1, 2], [1, 2]]))
    assert after.isnan().tolist() == [[False] * 2, [True] * 2]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (keys(version=wire.WIRE_VERSION + 1), BadReply, "version: got"),
        (keys(model_id="n"), BadReply, "model_id: got n, the model's facts say m"),
        (keys(rank=4), BadReply, "rank: got 4, the model's facts say 3"),
        (keys(K[1:]), BadReply, "keys: got 90, the model's facts say 96"),
        (keys(K + np.float16(np.inf)), BadReply, "keys: one is not finite"),
        (keys()[:-1], BadReply, None),
        (keys() + bytes(100_000), BadReply, "more than"),
        (b"{}", BadReply, None),
        (httpx.Response(404, text="none"), Refused, "/v1/lookahead-keys: HTTP 404 none"),
        (httpx.ReadError("reset"), Unreachable, None),
    ],
)
def test_key_errors(answer: Any, error: type[Exception], message: str | None) -> None:
    client = connect(Server(answer))
    with pytest.raises(error, match=message):
        client.keys(AHEAD)
    assert client.rests


def test_a_bad_address_is_unreachable() -> None:
    for url in ("http://", "ftp://x", "unix:/no/such/socket", "http://127.0.0.1:9"):
        with pytest.raises(Unreachable):
            ValueClient(url, timeout_s=1.0).step(STEP)


def test_an_answer_in_pieces_has_no_more_time_than_one_in_a_piece() -> None:
    clock = Clock()

    def pieces() -> Iterator[bytes]:
        for byte in reply():
            clock.time += 0.5
            yield bytes([byte])

    server = Server(httpx.Response(200, content=pieces()))
    with pytest.raises(TimedOut):
        connect(server, clock=clock, timeout_s=2.0).step(STEP)
    assert clock.time == 2.5


def failing(ask: Callable[[], object], error: type[Exception]) -> None:
    with pytest.raises(error):
        ask()


def test_circuit_opens_backs_off_and_closes() -> None:
    down, clock = httpx.ConnectError("down"), Clock()
    server = Server(down, down, down, down, reply(), down, reply())
    client = connect(server, clock=clock, backoff_s=(1.0, 4.0))
    assert not client.rests
    for asked, pause in enumerate((1.0, 2.0, 4.0, 4.0), start=1):
        failing(lambda: client.step(STEP), Unreachable)
        clock.time += pause - 0.01
        assert client.rests
        failing(lambda: client.step(STEP), CircuitOpen)
        failing(lambda: client.model(ours), CircuitOpen)
        assert len(server.requests) == asked
        clock.time += 0.01
        assert not client.rests
    client.step(STEP)
    failing(lambda: client.step(STEP), Unreachable)
    clock.time += 1.0  # after a good answer the first pause again
    client.step(STEP)


def test_after_a_failure_the_model_is_asked_for_again() -> None:
    """A server that comes back may serve another model."""
    clock = Clock()
    server = Server(info(), httpx.ReadTimeout("slow"), info(gamma=0.5))
    client = connect(server, clock=clock, backoff_s=(1.0, 1.0))
    assert client.model(ours).gamma == 0.99
    failing(lambda: client.step(STEP), TimedOut)
    clock.time = 1.0
    assert client.model(ours).gamma == 0.5


def test_probe_waits_less_than_a_step() -> None:
    server = Server(info(), reply())
    client = connect(server, timeout_s=2.0)
    client.model(ours)
    client.step(STEP)
    assert [r.extensions["timeout"]["read"] for r in server.requests] == [0.25, 2.0]
