"""What the server logs, and its OpenTelemetry spans: events and whom they concern, never a text
and never a token.

A line names the sessions of its request, whose ids begin with the id that the request had in
vLLM (its X-Request-Id header, if it came with one), so that both logs can be read side by side.
A span is part of the trace of the vLLM step that asked (W3C headers).
"""

import logging
import os
from typing import Any, Literal

import msgspec
from fastapi import FastAPI, Request

from value_server.contract import wire
from value_server.engine.errors import RequestError
from value_server.http.text import TextRequest

log = logging.getLogger("value_server")

# A field that no request of ours has is the client's own word, perhaps a text.
FIELDS = {
    *(field.name for field in msgspec.structs.fields(wire.StepRequest)),
    *TextRequest.model_fields,
    *("body", "authorization", "id", "digest"),
}
MOST = 8  # sessions of one request that are named
LONGEST = 64  # characters of each
# The variables that vLLM and OpenTelemetry's own exporters read.
ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
# Routes, and no model whose name has such a word; that of a picture has its digest.
UNTRACED = "/(health|ready|metrics|pictures/[^/]*)$"


def configure_logs(form: Literal["text", "json"]) -> None:
    """For this process, uvicorn's lines included: text, or a JSON object a line."""
    handler = logging.StreamHandler()
    if form == "json":
        from pythonjsonlogger.json import JsonFormatter

        names = {"asctime": "time", "levelname": "level", "name": "logger"}
        fields = "%(asctime)s %(levelname)s %(name)s %(message)s"
        handler.setFormatter(JsonFormatter(fields, rename_fields=names))
    else:
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for client in ("httpx", "httpx2"):  # of the model hub, a line for each file
        logging.getLogger(client).setLevel(logging.WARNING)


def log_refusal(request: Request, error: RequestError, session: str | None = None) -> None:
    """A request that was not served, or of a step the row of one session.

    The error's own message may quote a text: it stays out.
    """
    names = (
        [session]
        if session
        else getattr(request.state, "sessions", None) or [request.headers.get("x-request-id", "")]
    )
    requests = [name[:LONGEST] for name in names[:MOST]]
    field = (error.field or "").split(".")[0]
    field = field if field in FIELDS else ""
    log.log(
        logging.WARNING if error.status >= 500 else logging.INFO,
        f"{error.status} {error.type} {field}, requests {requests}",
        extra={"status": error.status, "type": error.type, "field": field, "requests": requests},
    )


def trace(app: FastAPI) -> None:
    """Make each request of `app` a span, where the environment names an endpoint.

    Raises ImportError without the extra `traces`.
    """
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
        excluded_urls=UNTRACED,
        exclude_spans=["receive", "send"],
    )


def _exporter() -> Any:
    """As vLLM chooses it: gRPC, unless the environment says http/protobuf."""
    if os.environ.get(PROTOCOL, "grpc") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(insecure=True)
    from opentelemetry.exporter.otlp.proto.http import trace_exporter

    return trace_exporter.OTLPSpanExporter()
