"""OpenTelemetry: each call to a value server is a span of vLLM's, where vLLM traces.

vLLM sets up the tracer of its processes (`--otlp-traces-endpoint`); without one, or without
OpenTelemetry, all of this does nothing.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from value_server.contract import wire


@contextlib.contextmanager
def step_span(request: wire.StepRequest) -> Iterator[dict[str, str]]:
    """Headers that carry the span to the server. It names the requests of this step."""
    if (api := _api()) is None:
        yield {}
        return
    headers: dict[str, str] = {}
    tracer = api.trace.get_tracer("lenvm_vllm")
    with tracer.start_as_current_span("lenvm.step", kind=api.trace.SpanKind.CLIENT) as span:
        if span.is_recording():
            span.set_attribute("lenvm.requests", request.sessions)
            span.set_attribute("lenvm.candidates", sum(request.candidate_counts))
            api.propagate.inject(headers)
        yield headers


def _api() -> Any:
    try:
        import opentelemetry.propagate
        import opentelemetry.trace
    except ImportError:
        return None
    return opentelemetry
