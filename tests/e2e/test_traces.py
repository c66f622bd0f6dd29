"""One trace through both processes of a real vLLM that traces, and its value server."""

import time

import pytest

from tests.e2e.pairs import Pair
from tests.support.collector import Collector

pytestmark = [pytest.mark.e2e, pytest.mark.pair("doors")]


def test_each_step_is_a_span_of_vllm_and_one_of_the_value_server(pair: Pair) -> None:
    assert pair.collector is not None
    before = steps_in_both(pair.collector)
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 30, "length_target": 20}
    assert pair.client.post("/v1/completions", json=body).status_code == 200
    deadline = time.monotonic() + 180
    while steps_in_both(pair.collector) <= before + 5:  # spans are sent every few seconds
        assert time.monotonic() < deadline
        time.sleep(0.2)


def steps_in_both(collector: Collector) -> int:
    """Spans of vLLM's whose child, in the same trace, is one of the value server's."""
    spans = [span for span, _ in collector.spans()]
    asked = {(s.span_id, s.trace_id) for s in spans if s.name == "lenvm.step"}
    served = {(s.parent_span_id, s.trace_id) for s in spans if s.name == "POST /v1/step"}
    return len(asked & served)
