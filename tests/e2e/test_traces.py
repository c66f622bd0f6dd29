"""One trace through both processes of a real vLLM that traces, and its value server."""

import contextlib
import time
from pathlib import Path

import httpx
import pytest

from lenvm_vllm.commands.servers import lenvm_serve
from tests.support.collector import Collector, collecting
from tests.support.servers import BARE_FLAG, vllm_serve
from tests.support.tiny import tiny_checkpoint
from tests.support.tiny_llm import tiny_llm

pytestmark = pytest.mark.e2e


def test_each_step_is_a_span_of_vllm_and_one_of_the_value_server(tmp_path: Path) -> None:
    checkpoint, model = tiny_checkpoint(tmp_path / "value"), tiny_llm(tmp_path / "model")
    with collecting() as collector, contextlib.ExitStack() as servers:
        log, env = tmp_path / "values.log", collector.environment
        values = servers.enter_context(lenvm_serve(checkpoint, log, base_model=model, env=env))
        flags = (*BARE_FLAG, "--otlp-traces-endpoint", collector.endpoint)
        env |= {"LENVM_URL": values.url, "LENVM_TIMEOUT_S": "30"}
        url = servers.enter_context(vllm_serve(model, tmp_path / "vllm.log", *flags, env=env))
        body = {"model": "tiny", "prompt": "hi", "max_tokens": 30, "length_target": 20}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        deadline = time.monotonic() + 60
        while steps_in_both(collector) <= 5:  # spans are sent every few seconds
            assert time.monotonic() < deadline
            time.sleep(0.2)


def steps_in_both(collector: Collector) -> int:
    """Spans of vLLM's whose child, in the same trace, is one of the value server's."""
    spans = [span for span, _ in collector.spans()]
    asked = {(s.span_id, s.trace_id) for s in spans if s.name == "lenvm.step"}
    served = {(s.parent_span_id, s.trace_id) for s in spans if s.name == "POST /v1/step"}
    return len(asked & served)
