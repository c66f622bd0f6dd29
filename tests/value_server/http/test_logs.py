"""One request in the logs and traces of both processes."""

import json
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lenvm_vllm.engine.state import session_of
from lenvm_vllm.target.request import REQUEST_ID
from lenvm_vllm.values.client import ValueClient
from tests.support.blocked import wait_until
from tests.support.through import call, chunk
from tests.support.value_servers import Server, step_body
from value_server.contract import wire


def test_the_id_of_a_request_goes_along() -> None:
    body = json.dumps({"prompt": "x", "length_target": 9}).encode()
    headers = [(b"X-Request-Id", b"order 66\n")]
    app, _, _ = call(chunk(body), headers=headers)
    xargs = json.loads(app.body)["vllm_xargs"]
    assert xargs[REQUEST_ID] == "order 66\n"
    first, second = session_of(xargs), session_of(xargs)
    assert first != second
    assert first.startswith("order_66_.")
    assert session_of({REQUEST_ID: "x" * 500}).startswith("x" * 64 + ".")
    assert len({session_of(None), session_of({})}) == 2


@pytest.mark.e2e
def test_json_lines_name_the_requests(server: Server, client: httpx.Client) -> None:
    rows = ("order-65.ab", 0, [9], [1]), ("order-66.ab", 0, [999], [1])
    client.post(wire.STEP_PATH, content=step_body(*rows)).raise_for_status()
    client.post(wire.PREDICT_PATH, json={}, headers={"X-Request-Id": "order-67"})
    log = server.log.read_text().splitlines()
    lines = [json.loads(line) for line in log if line.startswith("{")]
    assert {"time", "level", "logger", "message"} <= set(lines[0])
    assert any(line["logger"] == "uvicorn.error" for line in lines)
    step, predict = [line for line in lines if "status" in line][-2:]
    assert (step["status"], step["field"], step["requests"]) == (422, "tokens", ["order-66.ab"])
    assert (predict["type"], predict["requests"]) == ("invalid_request", ["order-67"])


@pytest.mark.e2e
def test_a_step_is_one_trace(server: Server) -> None:
    ours = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ours))
    trace.set_tracer_provider(provider)
    message = wire.decode_request(step_body(("order-66.ab", 0, [1], [2])))
    client = ValueClient(server.url, timeout_s=60, token=server.tokens[0])
    assert client.step(message).held == [1]
    (span,) = ours.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["lenvm.requests"] == ("order-66.ab",)

    def same_trace() -> list[tuple[Any, str]]:
        spans = server.spans.spans()
        return [s for s in spans if int.from_bytes(s[0].trace_id, "big") == span.context.trace_id]

    wait_until(lambda: bool(same_trace()))
    ((found, process),) = same_trace()
    assert found.name == f"POST {wire.STEP_PATH}"
    assert int.from_bytes(found.parent_span_id, "big") == span.context.span_id
    assert "lenvm-value-server" in process
