"""OpenTelemetry: each request a span, in the trace of the vLLM step that asked (W3C headers).

On where the environment names an endpoint, by the variables that vLLM and OpenTelemetry's own
exporters read. Needs the extra `traces`.
"""

import os
from typing import Any

from fastapi import FastAPI

ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"


def trace(app: FastAPI) -> None:
    """Does nothing where no endpoint is named. Raises ImportError without the extra."""
    if not os.environ.get(ENDPOINT):
        return
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "lenvm-value-server"}))
    provider.add_span_processor(BatchSpanProcessor(_exporter()))
    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=provider,
        excluded_urls="health,ready,metrics",
        exclude_spans=["receive", "send"],
    )


def _exporter() -> Any:
    """As vLLM chooses it: gRPC, unless the environment says http/protobuf."""
    if os.environ.get(PROTOCOL, "grpc") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(insecure=True)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
        OTLPSpanExporter as HttpExporter,
    )

    return HttpExporter()
