"""What the server logs: events and whom they concern, never a text and never a token.

A line names the sessions of its request, whose ids begin with the id that the request had in
vLLM (its X-Request-Id header, if it came with one), so that both logs can be read side by side.
"""

import logging
from typing import Literal

import msgspec
from fastapi import Request

from value_server.contract import wire
from value_server.engine.errors import RequestError
from value_server.http.text import TextRequest

log = logging.getLogger("value_server")

# A field that no request of ours has is the client's own word, perhaps a text.
FIELDS = {
    *(field.name for field in msgspec.structs.fields(wire.StepRequest)),
    *TextRequest.model_fields,
    *("body", "authorization", "id"),
}
MOST = 8  # sessions of one request that are named
LONGEST = 64  # characters of each


def configure(form: Literal["text", "json"]) -> None:
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


def log_refusal(request: Request, error: RequestError) -> None:
    """A request that was not served. The error's own message may quote a text: it stays out."""
    names = getattr(request.state, "sessions", None) or [request.headers.get("x-request-id", "")]
    concerned = [name[:LONGEST] for name in names[:MOST]]
    level = logging.WARNING if error.status >= 500 else logging.INFO
    field = (error.field or "").split(".")[0]
    facts = {"status": error.status, "type": error.type, "field": field if field in FIELDS else ""}
    log.log(
        level,
        "%d %s %s, requests %s",
        *(*facts.values(), concerned),
        extra=facts | {"requests": concerned},
    )
