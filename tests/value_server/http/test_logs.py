"""One request in the logs and traces of both processes."""

import json
import signal
from pathlib import Path

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lenvm_vllm.engine.state import session_of
from lenvm_vllm.target.request import REQUEST_ID
from lenvm_vllm.values.client import ValueClient
from tests.lenvm_vllm.api.test_middleware import call, chunk
from tests.support.collector import collecting
from tests.support.tiny import tiny_checkpoint
from tests.value_server.http.test_security import served
from tests.value_server.http.test_server import free_port, launch, step_body, wait_ready
from value_server.contract import wire


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


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
def test_json_lines_name_the_requests(checkpoint: Path) -> None:
    port = free_port()
    process = launch(str(checkpoint), "--port", str(port), "--log-format", "json")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        wait_ready(client, process)
        client.post(wire.STEP_PATH, content=step_body(("order-66.ab", 0, [999], [1])))
        client.post(wire.PREDICT_PATH, json={}, headers={"X-Request-Id": "order-67"})
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=30)
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert {"time", "level", "logger", "message"} <= set(lines[0])
    assert any(line["logger"] == "uvicorn.error" for line in lines)
    step, predict = (line for line in lines if "status" in line)
    assert (step["status"], step["field"], step["requests"]) == (422, "tokens", ["order-66.ab"])
    assert (predict["type"], predict["requests"]) == ("invalid_request", ["order-67"])


@pytest.mark.e2e
def test_a_step_is_one_trace(checkpoint: Path) -> None:
    ours = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ours))
    trace.set_tracer_provider(provider)
    with collecting() as collector:
        with served(checkpoint, **collector.environment) as (url, _):
            message = wire.decode_request(step_body(("order-66.ab", 0, [1], [2])))
            assert ValueClient(url, timeout_s=60).step(message)[1] == []
        ((found, process),) = collector.spans()  # all are sent by its end
    (span,) = ours.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["lenvm.requests"] == ("order-66.ab",)
    assert found.name == f"POST {wire.STEP_PATH}"
    assert int.from_bytes(found.trace_id, "big") == span.context.trace_id
    assert int.from_bytes(found.parent_span_id, "big") == span.context.span_id
    assert "lenvm-value-server" in process
