"""The routes of vLLM's own application, without an engine behind them.

Every route that writes text is known; the middleware stands inside of vLLM's authentication and
CORS and of what an operator puts around, and reads nothing that these turn away.
"""

import argparse
import asyncio
from typing import Any

import pytest
from starlette.testclient import TestClient
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import make_arg_parser  # where it is from has moved
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from lenvm_vllm.api.middleware import LengthTargetMiddleware
from lenvm_vllm.api.routes import CHAT, PATHS, RECORDINGS, ROUTES, TEXT
from lenvm_vllm.plugin import MIDDLEWARE, register
from lenvm_vllm.target.request import HAS_CALLS, LengthTarget

KEY = {"Authorization": "Bearer k"}
WRONG = {"model": "m", "prompt": "x", "length_target": 0}
# Routes of vLLM that write no text: they take no length, and what else stands in a body of
# theirs is none of our business.
NO_TEXT = {
    *("/tokenize", "/detokenize", "/v1/messages/count_tokens", "/ping", "/abort_requests"),
    *("/v1/chat/completions/derender", "/v1/completions/derender"),  # texts of what was written
    *("/v1/responses/{response_id}/cancel", "/inference/v1/abort_requests"),
    *("/scale_elastic_ep", "/is_scaling_elastic_ep", "/fault_tolerance/apply"),
    *(
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/adapters",
        "/start_profile",
        "/stop_profile",
    ),
    # pooling
    *("/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    *("/v1/embeddings", "/v2/embed"),
    # development and reinforcement learning
    *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/collective_rpc"),
    *("/sleep", "/wake_up", "/release_kv_cache_memory", "/pause", "/resume"),
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/weight_checker"),
    *("/start_weight_update", "/start_draft_weight_update", "/update_weights"),
    *("/finish_weight_update", "/update_weight_version"),
}


def app_of(*flags: str, tasks: tuple[Any, ...] = ("generate", "transcription")) -> Any:
    """vLLM's application as `vllm serve` builds it."""
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(
        ["--middleware", MIDDLEWARE, *flags]
    )
    return build_app(args, tasks)


@pytest.fixture(scope="module")
def client() -> TestClient:
    """Of an application that has had its first call."""
    operators = "tests.support.compressing.Compressing"
    app = app_of(
        "--api-key", "k", "--allowed-origins", '["http://page"]', "--middleware", operators
    )
    client = TestClient(app, raise_server_exceptions=False)
    assert client.get("/version").status_code == 200
    return client


@pytest.mark.parametrize("flags", [(), ("--enable-scale-out",), ("--tokens-only",)])
def test_every_route_that_writes_is_known(flags: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    app = app_of(*flags, tasks=("generate", "transcription", "realtime", "embed", "classify"))
    posts = {r.path for r in app.routes if "POST" in (getattr(r, "methods", None) or ())}
    assert {CHAT, TEXT, *RECORDINGS} <= posts
    assert posts - {*PATHS, *RECORDINGS} - NO_TEXT == set()
    elsewhere = {"/v1/decisions"}  # of vLLM 0.33
    elsewhere |= {path for path in PATHS if path.startswith("/cohere")}  # needs their package
    assert {*PATHS} - posts <= elsewhere


def test_the_middleware_is_innermost(client: TestClient) -> None:
    stack = client.app.router.middleware_stack  # type: ignore[attr-defined]
    assert isinstance(stack, LengthTargetMiddleware)
    assert stack._app == client.app.router.app  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "path", [path for path in ROUTES if path.startswith(("/v1", "/inference"))]
)
def test_without_a_key_nothing_is_looked_at(client: TestClient, path: str) -> None:
    assert client.post(path, json=WRONG).status_code == 401
    reply = client.post(path, json=WRONG, headers=KEY)
    assert reply.status_code == 400
    assert "got 0" in reply.text


def test_a_400_has_what_cors_adds(client: TestClient) -> None:
    headers = KEY | {"Origin": "http://page"}
    reply = client.post(TEXT, json=WRONG, headers=headers)
    assert (reply.status_code, "got 0" in reply.text) == (400, True)
    assert reply.headers["access-control-allow-origin"] == "http://page"


def test_without_a_key_a_body_is_not_read(client: TestClient) -> None:
    """However long it would have been."""
    read: list[Any] = []
    sent: list[Any] = []

    async def receive() -> Any:
        read.append(1)
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        **{"type": "http", "method": "POST", "path": TEXT, "raw_path": TEXT.encode()},
        **{"headers": [], "query_string": b"", "root_path": "", "http_version": "1.1"},
        **{"scheme": "http", "server": ("x", 80), "client": ("y", 1)},
    }
    asyncio.run(client.app(scope, receive, send))  # type: ignore[arg-type]
    assert (sent[0]["status"], read) == (401, [])


def test_what_compresses_is_outside(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lenvm_vllm.api.middleware.exposition", lambda: b"lenvm_requests_total 1\n")
    headers = KEY | {"Accept-Encoding": "gzip"}
    for reply in (
        client.post(TEXT, json=WRONG, headers=headers),
        client.get("/metrics", headers={"Accept-Encoding": "gzip"}),
    ):
        assert reply.headers["content-encoding"] == "gzip"
    assert "lenvm_requests_total" in reply.text


@pytest.mark.parametrize("path", RECORDINGS)
def test_a_form_with_the_field(client: TestClient, path: str) -> None:
    recording = {"file": ("a.wav", b"RIFF" * 50_000)}
    for name in ("length_target", "lengthTarget"):
        form = {"model": "m", name: "80"}
        reply = client.post(path, data=form, files=recording, headers=KEY)
        assert reply.status_code == 400
        assert f"{name}: length_target is not available for recordings" in reply.text
    plain = client.post(path, data={"model": "m", "length_penalty": "1.0"}, files=recording)
    assert "not available" not in plain.text


def test_the_lengths_of_batch_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """`vllm run-batch` reads requests from a file, without a route."""
    for name in ("to_sampling_params", "to_beam_search_params"):
        monkeypatch.setattr(ChatCompletionRequest, name, getattr(ChatCompletionRequest, name))
    register()
    args = argparse.Namespace(model="m", logits_processors=["lenvm_vllm"], input_file="x")
    for _ in range(2):
        AsyncEngineArgs.from_cli_args(args)

    def params(**fields: Any) -> Any:
        request = {"messages": [{"role": "user", "content": "hi"}], **fields}
        return ChatCompletionRequest.model_validate(request).to_sampling_params(50, {})

    asked = {"tokens": "30", "tolerance": 0}
    found = params(length_target=asked, vllm_xargs={"other": 1}).extra_args
    assert found == {"other": 1} | LengthTarget.parse(asked).to_xargs()
    assert params().extra_args is None
    tool = {"type": "function", "function": {"name": "look"}}
    assert params(length_target=9, tools=[tool]).extra_args[HAS_CALLS] == 1
    for wrong in ({"length_target": 0}, {"lengthTarget": 5}, {"vllm_xargs": {"length_bet": 5}}):
        with pytest.raises(ValueError, match="length"):
            params(**wrong)
    beams = {"messages": [{"role": "user", "content": "hi"}], "use_beam_search": True}
    asked = ChatCompletionRequest.model_validate(beams | {"length_target": 9})
    with pytest.raises(ValueError, match="use_beam_search: true contradicts length_target"):
        asked.to_beam_search_params(50, {})
    ChatCompletionRequest.model_validate(beams).to_beam_search_params(50, {})
