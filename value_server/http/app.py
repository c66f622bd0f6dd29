"""The application: routes, the guard in front of them, and what an error looks like."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from value_server.contract.wire import WireError, model_path
from value_server.engine.errors import MalformedError, RequestError
from value_server.http.guard import Guard
from value_server.http.metrics import Figures
from value_server.http.models import Models, ServedModel, name_of
from value_server.http.routes import error_response, router
from value_server.http.telemetry import log_refusal

HTTP_TYPES = {404: "not_found", 405: "method_not_allowed"}


def create_app(
    served: Mapping[str, ServedModel],
    *,
    tokens: Sequence[str] = (),
    max_body_bytes: int = 16 << 20,
) -> FastAPI:
    """The application; its lifespan starts and stops the engines' threads. served: see Models."""
    models = Models(served)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        models.start()
        yield
        await run_in_threadpool(models.stop)

    app = FastAPI(title="LenVM value server", lifespan=lifespan)
    app.state.models = models
    app.state.figures = Figures({name: model.metrics for name, model in served.items()})
    app.include_router(router)
    app.include_router(router, prefix=model_path("{model:path}"), include_in_schema=False)
    app.add_middleware(
        Guard, names=list(served), tokens=tokens, max_body_bytes=max_body_bytes, refuse=refuse
    )
    for kind in (RequestError, WireError, RequestValidationError):
        app.add_exception_handler(kind, on_refusal)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)
    return app


def refuse(request: Request, error: RequestError) -> Response:
    """Count the error, log it, and answer with it."""
    count(request, error.type)
    log_refusal(request, error)
    return error_response(error.status, error.type, error.message, error.field)


def count(request: Request, kind: str) -> None:
    request.app.state.figures.error(kind, name_of(request))


async def on_refusal(request: Request, error: Exception) -> Response:
    return refuse(request, as_request_error(error))


async def on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = HTTP_TYPES.get(error.status_code, "http_error")
    return error_response(error.status_code, kind, str(error.detail), None)


async def on_bug(request: Request, _: Exception) -> Response:
    count(request, "internal_error")
    return error_response(500, "internal_error", "internal error, see the server's log", None)


def as_request_error(error: Exception) -> RequestError:
    """The one place where what others say of a request is said in our words."""
    if isinstance(error, WireError):
        return MalformedError(str(error), error.field)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return MalformedError(f"body: not JSON: {first['ctx']['error']}", "body")
        where = ".".join(str(part) for part in first["loc"] if part != "body") or None
        return RequestError(f"{where or 'body'}: {first['msg']}", where)
    assert isinstance(error, RequestError)
    return error
