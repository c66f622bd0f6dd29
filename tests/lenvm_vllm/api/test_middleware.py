"""The ASGI middleware: what it moves, and that it leaves all else alone."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm_vllm.api.middleware import LengthTargetMiddleware
from lenvm_vllm.api.routes import CHAT, GENERATE, INVOCATIONS, MESSAGES, PATHS, ROUTES, TEXT
from lenvm_vllm.host import served
from lenvm_vllm.target.request import HAS_CALLS, LengthTarget
from lenvm_vllm.telemetry.progress import KEY
from tests.support.through import call, chunk, post

PREFILL = {"kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}
TAKING = [path for path in PATHS if path == INVOCATIONS or not ROUTES[path].refusal]
FOREIGN = b'{ "model":"m",\n "temperature": 1.0 ,"x":"\\u00e4", "model":"twice"}'


@pytest.mark.parametrize("path", sorted({*TAKING} - {GENERATE}))
@pytest.mark.parametrize("value", [200, {"mode": "tilt", "beta": -2.5, "tolerance": None}])
def test_field_moves_into_xargs(path: str, value: Any) -> None:
    body = {"model": "m", "seed": 3, "max_tokens": 300}
    app, status, _ = post(body | {"length_target": value}, path=path)
    assert status == 200
    assert (KEY in json.loads(app.body)["vllm_xargs"]) is not path.endswith("/render")
    flat = LengthTarget.parse(value).to_xargs()
    assert app.asked == body | {"vllm_xargs": flat}
    assert LengthTarget.from_extra_args(flat) == LengthTarget.parse(value)
    assert app.headers[b"content-length"] == str(len(app.body)).encode()
    assert b"Content-Length" not in app.headers


def test_other_xargs_stay() -> None:
    app, _, _ = post({"length_target": 9, "vllm_xargs": {"other": [1, 2]}})
    assert app.asked["vllm_xargs"] == {"other": [1, 2]} | LengthTarget.parse(9).to_xargs()


@pytest.mark.parametrize("length", [{"length_target": 9}, {"vllm_xargs": {"length_target": 9}}])
def test_only_with_tools_calls_are_taken_out_of_a_text(length: dict[str, Any]) -> None:
    tools = {"tools": [{"type": "function", "function": {"name": "look"}}]}
    for fields, has_calls in (
        ({}, False),
        ({"tools": []}, False),
        (tools, True),
        (tools | {"tool_choice": "auto"}, True),
        (tools | {"tool_choice": "none"}, False),
    ):
        app, _, _ = post(length | fields)
        assert (HAS_CALLS in app.asked["vllm_xargs"]) is has_calls


def test_tokens_in_tokens_out_has_sampling_parameters_of_its_own() -> None:
    """They come from the client, or flat from a door that prepares requests."""
    params = {"max_tokens": 60, "extra_args": {"other": 1}}
    body = {"token_ids": [1], "sampling_params": params, "length_target": 50}
    app, status, _ = post(body, path=GENERATE)
    assert status == 200
    flat = LengthTarget.parse(50).to_xargs()
    moved = params | {"extra_args": {"other": 1} | flat}
    assert json.loads(app.body) == {"token_ids": [1], "sampling_params": moved}
    ready = {"token_ids": [1], "sampling_params": {"max_tokens": 40, "extra_args": flat}}
    _, status, answer = post(ready, path=GENERATE)
    assert (status, "max_tokens: 40" in answer["error"]["message"]) == (400, True)
    for wrong in ({"vllm_xargs": {"length_target": 5}}, {"sampling_params": {"length_target": 5}}):
        assert post(wrong, path=GENERATE)[1] == 400


def test_sagemakers_door_is_one_of_chats_or_of_texts() -> None:
    chat, text = {"messages": [], "length_target": 50}, {"prompt": "x", "length_target": 50}
    assert post(chat, path=INVOCATIONS)[1] == 200
    _, status, answer = post(text, path=INVOCATIONS)
    assert (status, "max_tokens: 16" in answer["error"]["message"]) == (400, True)


@pytest.mark.parametrize("path", [CHAT, TEXT, MESSAGES])
@pytest.mark.parametrize("asked", [{"length_target": 50}, {"vllm_xargs": {"length_target": 50}}])
def test_a_prefill_has_one_token(path: str, asked: Any) -> None:
    """Its proxy sets the limit; the engine then finds the transfer beside the target."""
    body = asked | PREFILL | {"max_tokens": 1, "min_tokens": 1, "stream": False}
    app, status, _ = post(body, path=path)
    assert status == 200
    sent = json.loads(app.body)
    assert sent["max_tokens"] == 1
    assert LengthTarget.from_extra_args(sent["vllm_xargs"] | PREFILL) is None
    assert post({"length_target": 0, "max_tokens": 1} | PREFILL, path=path)[1] == 400
    assert post(asked | {"max_tokens": 1}, path=path)[1] == 400
    decode = {"kv_transfer_params": {"do_remote_prefill": True}}
    assert post(asked | decode | {"max_tokens": 1}, path=path)[1] == 400


@pytest.mark.parametrize("kind", ["kv", "ec"])
def test_a_pod_may_be_for_prefills_only(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some proxies say nothing in the request but its limit."""
    for role, status in ((f"{kind}_producer", 200), (f"{kind}_consumer", 400)):
        config = SimpleNamespace(
            additional_config={},
            model_config=SimpleNamespace(max_model_len=1000),
            speculative_config=None,
            parallel_config=SimpleNamespace(enable_batch_sharded_sampling=False),
            reasoning_config=None,
            **{f"{kind}_transfer_config": SimpleNamespace(**{f"{kind}_role": role})},
        )
        monkeypatch.setattr(served, "config", config)
        assert post({"length_target": 50, "max_tokens": 1})[1] == status


def test_limits_of_a_wrong_type_are_left_to_vllm() -> None:
    app, status, _ = post({"length_target": 9, "max_tokens": "few", "min_tokens": None})
    assert (status, json.loads(app.body)["max_tokens"]) == (200, "few")
    _, status, answer = post({"length_target": 9, "max_tokens": "5"})  # vLLM reads it as 5
    assert (status, "max_tokens: 5" in answer["error"]["message"]) == (400, True)


def test_null_is_no_target() -> None:
    app, status, _ = post({"model": "m", "length_target": None})
    assert (status, json.loads(app.body)) == (200, {"model": "m"})


@pytest.mark.parametrize(
    "body",
    [
        FOREIGN,
        b"",
        b"\xff\xfe not json",
        b'{"length_target": 5',
        b'["length_target"]',
        b'"length_target"',
        b'{"messages": [{"content": "my length_target is 5"}]}',
        b'{"length_penalty":  1.5}',
        b'{"use_beam_search":  true, "length_penalty": 2}',
        b'{"messages": "length_", "x": ' + b"[" * 100_000,
    ],
)
def test_everything_else_goes_on_byte_for_byte(body: bytes) -> None:
    app, status, _ = call(chunk(body))
    assert (status, app.body) == (200, body)
    assert app.headers[b"Content-Length"] == str(len(body)).encode()


NAMES = [
    *("length_target", "lengthTarget", "length_mode", "length_tolerance", "tokens", "tolerance"),
    *("vllm_xargs", "extra_body", "sampling_params", "extra_args", "kv_transfer_params"),
    *("max_tokens", "min_tokens", "n", "priority", "messages", "content", "prompt", "tools"),
]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(NAMES), values, max_size=5))
def test_no_body_is_an_error_of_ours(path: str, body: Any) -> None:
    assert post(body, path=path)[1] in (200, 400)


@given(st.lists(st.binary(max_size=9)))
def test_chunks_go_on_as_they_came(parts: list[bytes]) -> None:
    app, _, _ = call(*(chunk(part, more=True) for part in parts), chunk(b""))
    assert app.body == b"".join(parts)


@given(st.integers(0, 40))
def test_field_across_chunks(split: int) -> None:
    body = b'{"model": "m", "length_target": 123}'
    app, status, _ = call(chunk(body[:split], more=True), chunk(body[split:]))
    assert status == 200
    assert json.loads(app.body)["vllm_xargs"]["length_target"] == 123


@pytest.mark.parametrize(
    "scope",
    [
        {"path": "/v1/embeddings"},
        {"path": "/v1/chat/completions/x"},
        {"path": "/tokenize"},
        {"method": "GET"},
        {"type": "websocket"},
    ],
)
def test_other_routes_are_not_read(scope: Any) -> None:
    app, status, _ = post({"length_target": 0}, **scope)
    assert (status, json.loads(app.body)) == (200, {"length_target": 0})


def test_root_path_is_left_out() -> None:
    app, _, _ = post({"length_target": 7}, path=f"/proxy{CHAT}", root_path="/proxy")
    assert json.loads(app.body)["vllm_xargs"]["length_target"] == 7


@pytest.mark.parametrize("body", [{"metadata": {"length_target": "5"}}, {"max_length": 5}])
def test_names_that_mean_something_else(body: Any) -> None:
    app, status, _ = post(body)
    assert (status, json.loads(app.body)) == (200, body)


def test_client_that_leaves_while_it_sends() -> None:
    app, _, _ = call(chunk(b'{"length_target"', more=True))
    assert app.disconnected
    assert app.body == b'{"length_target"'


def test_client_that_leaves_later_is_noticed() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive()])
        await send({"type": "http.response.start", "status": 499, "headers": []})

    waiting = [chunk(b'{"length_target": 5}'), {"type": "http.disconnect"}]

    async def receive() -> Any:
        return waiting.pop(0)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}

    async def send(message: Any) -> None: ...

    asyncio.run(LengthTargetMiddleware(app)(scope, receive, send))
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]
