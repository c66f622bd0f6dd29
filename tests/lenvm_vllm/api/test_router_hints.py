"""What a router is told of a request: the header, Dynamo's hint, and nothing else of it changes."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from lenvm_vllm.api.forecast import Forecast
from lenvm_vllm.api.middleware import PREDICTED
from lenvm_vllm.api.router_hints import RouterHints, with_osl
from lenvm_vllm.api.routes import CHAT, MESSAGES, TEXT
from lenvm_vllm.settings import Settings
from tests.support.through import Keeper, chunk, send_through

HEADER = PREDICTED.encode()
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def passed(
    request: Any, path: str = CHAT, status: int = 200, dynamo: bool = True, **scope: Any
) -> Keeper:
    """What the router gets. status: of the value server, which predicts 322.6 tokens."""
    keeper = Keeper()
    answer = httpx.Response(status, json={"predicted_tokens": 322.6})
    forecast = Forecast(Settings(), httpx.MockTransport(lambda _: answer))
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    scope = {"headers": [(b"content-length", b"%d" % len(body))]} | scope
    messages = chunk(body[:7], more=True), chunk(body[7:])
    hints = RouterHints(keeper, dynamo=dynamo, forecast=forecast)
    assert send_through(hints, *messages, path=path, **scope)[0] == 200
    return keeper


@pytest.mark.parametrize(
    ("path", "request_body"), [(CHAT, HELLO), (TEXT, {"prompt": "hi", "max_tokens": 999})]
)
def test_dynamos_hint_and_the_header(path: str, request_body: dict[str, Any]) -> None:
    keeper = passed(request_body, path)
    assert json.loads(keeper.body) == request_body | {"nvext": {"agent_hints": {"osl": 323}}}
    assert keeper.headers[HEADER] == b"323"
    assert int(keeper.headers[b"content-length"]) == len(keeper.body)


@pytest.mark.parametrize(
    ("path", "dynamo", "request_body"),
    [(CHAT, False, HELLO), (MESSAGES, True, HELLO), ("/v1/responses", True, {"input": "hi"})],
)
def test_the_header_alone(path: str, dynamo: bool, request_body: dict[str, Any]) -> None:
    keeper = passed(request_body, path, dynamo=dynamo)
    assert (keeper.body, keeper.headers[HEADER]) == (json.dumps(request_body).encode(), b"323")


@pytest.mark.parametrize(
    ("more", "tokens"),
    [
        ({"length_target": 80}, 80),
        ({"length_target": {"mode": "at_most", "tokens": 500}}, 323),
        ({"length_target": "nonsense"}, 323),  # the engine's 400
        ({"vllm_xargs": {"length_target": 80}}, 80),
        ({"vllm_xargs": {"length_words": "many"}}, 323),
        ({"vllm_xargs": [1]}, 323),
        ({"max_tokens": 64}, 64),
    ],
)
def test_a_target_and_a_limit_count(more: dict[str, Any], tokens: int) -> None:
    keeper = passed(HELLO | more)
    assert keeper.headers[HEADER] == b"%d" % tokens
    asked = json.loads(keeper.body)
    assert asked.pop("nvext") == {"agent_hints": {"osl": tokens}}
    assert asked == HELLO | more


@pytest.mark.parametrize(
    ("nvext", "after"),
    [
        ({"agent_hints": {"priority": 5}}, {"agent_hints": {"priority": 5, "osl": 7}}),
        ({"extra_fields": ["timing"]}, {"extra_fields": ["timing"], "agent_hints": {"osl": 7}}),
        (None, {"agent_hints": {"osl": 7}}),
        ({"agent_hints": {"osl": 9}}, None),
        ("a text", None),
        ({"agent_hints": [1]}, None),
    ],
)
def test_what_a_client_says_itself_stays(nvext: Any, after: Any) -> None:
    request = {"nvext": nvext}
    assert with_osl(request, 7) is (after is not None)
    assert request["nvext"] == (after or nvext)


def test_osl_has_32_bits() -> None:
    request: dict[str, Any] = {}
    with_osl(request, 2**40)
    assert request["nvext"]["agent_hints"]["osl"] == 2**32 - 1


@pytest.mark.parametrize(
    ("request_body", "path", "more"),
    [
        (HELLO, CHAT, {"status": 503}),
        (HELLO, "/v1/models", {}),
        (HELLO, CHAT, {"method": "GET"}),
        (HELLO, f"{CHAT}/render", {}),  # it writes no text
        (b"no JSON, but long", CHAT, {}),
        (b"[1, 2, 3, 4, 5, 6]", CHAT, {}),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, CHAT, {}),
    ],
)
def test_what_has_no_forecast_goes_on_as_it_came(request_body: Any, path: str, more: Any) -> None:
    forged = [(b"Lenvm-Predicted-Tokens", b"1"), (b"x-other", b"2")]
    keeper = passed(request_body, path, headers=forged, **more)
    body = request_body if isinstance(request_body, bytes) else json.dumps(request_body).encode()
    assert keeper.body == body
    assert keeper.headers == {b"x-other": b"2"}


def test_a_new_body_is_told_in_one_way() -> None:
    """The bug guarded against: a length beside the client's chunks, of which a proxy may read two
    requests."""
    keeper = passed(HELLO, headers=[(b"transfer-encoding", b"chunked"), (b"x-other", b"2")])
    assert keeper.headers.keys() == {HEADER, b"content-length", b"x-other"}
    assert int(keeper.headers[b"content-length"]) == len(keeper.body)


def test_behind_what_it_is_mounted_at() -> None:
    assert passed(HELLO, f"/here{CHAT}", root_path="/here").headers[HEADER] == b"323"


def test_no_client_says_it_over_a_websocket() -> None:
    seen = []

    async def router(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope.get("headers"))

    hints = RouterHints(router, Settings())
    for scope in ({"type": "websocket", "path": "/v1/realtime"}, {"type": "lifespan"}):
        own = {} if scope["type"] == "lifespan" else {"headers": [(HEADER, b"1"), (b"a", b"2")]}
        asyncio.run(hints(scope | own, None, None))
    assert seen == [[(b"a", b"2")], None]
