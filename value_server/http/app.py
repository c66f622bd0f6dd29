"""The HTTP side: routes, and what an error looks like.

Errors are JSON: {"error": {"type", "message", "field"}}, with the status of errors.py.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive

from value_server.contract import wire
from value_server.contract.values import length_from_logit
from value_server.engine.batcher import Batcher
from value_server.engine.engine import Engine
from value_server.engine.errors import (
    ClientGoneError,
    MalformedError,
    RequestError,
    UnknownSessionError,
)
from value_server.engine.job import Job, JobResult, StepRow
from value_server.engine.served import Served
from value_server.http.guard import Guard
from value_server.http.logs import log_refusal
from value_server.http.metrics import Metrics
from value_server.http.text import Prediction, TextRequest, Texts

T = TypeVar("T")

HTTP_TYPES = {404: "not_found", 405: "method_not_allowed"}
PATIENCE_SECONDS = 0.1  # a step is faster: only after it is it worth looking whether anybody waits


def create_app(
    engine: Engine,
    texts: Texts,
    *,
    tokens: Sequence[str] = (),
    max_body_bytes: int = 16 << 20,
    max_waiting: int = 1024,
) -> FastAPI:
    """The application; its lifespan starts and stops the engine's thread.

    `engine` should be warm already (Engine.warm_up).
    """
    metrics = Metrics(lambda: served.engine)
    served = Served(engine, lambda engine: Batcher(engine, max_waiting, metrics.on_pass))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served.start()
        yield
        await run_in_threadpool(served.stop)

    def answer(error: RequestError, request: Request) -> Response:
        metrics.errors.labels(error.type).inc()
        log_refusal(request, error)
        return error_response(error.status, error.type, error.message, error.field)

    async def run(job: Job, http: Request) -> JobResult:
        return await served.run(job, lambda future: while_connected(future, http.receive))

    async def values(request: TextRequest, http: Request) -> list[float]:
        """Predicted remaining length after each token of the text."""
        ids = await run_in_threadpool(texts.ids, request)
        name = _own(http, f"text-{uuid.uuid4()}")
        row = StepRow(name, 0, ids)
        try:
            served.engine.check([row])
        except RequestError as error:  # in the words of this request
            message = error.message.replace("tokens", request.given, 1)
            raise RequestError(message, request.given) from error
        try:
            result = await run(Job([row], texts=True, client=http.state.client), http)
        finally:
            served.forget(name)
        z = torch.from_numpy(result.texts[0])
        lengths: list[float] = length_from_logit(z.double(), served.gamma).tolist()
        return lengths

    app = FastAPI(title="LenVM value server", lifespan=lifespan)
    app.state.served = served
    app.state.metrics = metrics
    app.add_middleware(Guard, tokens=tokens, max_body_bytes=max_body_bytes, answer=answer)

    @app.exception_handler(RequestError)
    async def on_request_error(request: Request, error: RequestError) -> Response:
        return answer(error, request)

    @app.exception_handler(wire.WireError)
    async def on_wire_error(request: Request, error: wire.WireError) -> Response:
        name, colon, _rest = str(error).partition(":")
        field = name if colon and " " not in name else None
        return answer(MalformedError(str(error), field), request)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            not_json = MalformedError(f"body: not JSON: {first['ctx']['error']}", "body")
            return answer(not_json, request)
        where = ".".join(str(part) for part in first["loc"] if part != "body") or None
        return answer(RequestError(f"{where or 'body'}: {first['msg']}", where), request)

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> Response:
        kind = HTTP_TYPES.get(error.status_code, "http_error")
        return error_response(error.status_code, kind, str(error.detail), None)

    @app.exception_handler(Exception)
    async def on_bug(_: Request, error: Exception) -> Response:
        metrics.errors.labels("internal_error").inc()
        return error_response(500, "internal_error", "internal error, see the server's log", None)

    @app.post(wire.STEP_PATH)
    async def step(request: Request) -> Response:
        """Score candidates. Body and answer: msgpack, see value_server/contract/wire.py."""
        body = await request.body()
        begin = time.perf_counter()
        message = wire.decode_request(body)
        request.state.sessions = message.sessions
        closed = [_own(request, name) for name in message.closed]
        job = Job(_rows(message, request), closed, client=request.state.client)
        decoded = time.perf_counter()
        result = await run(job, request)
        answered = time.perf_counter()
        reply = wire.StepReply(logits=wire.pack_logits(result.logits), unknown=result.unknown)
        content = wire.encode(reply)
        end = time.perf_counter()
        metrics.on_step(job, decoded - begin + end - answered, end - begin)
        return Response(content, media_type=wire.MEDIA_TYPE)

    @app.post(wire.PREDICT_PATH)
    async def predict(request: TextRequest, http: Request) -> Prediction:
        """The length to expect after this prompt, in tokens, words and characters."""
        tokens = (await values(request, http))[-1]
        return await run_in_threadpool(texts.prediction, request, tokens)

    @app.post(wire.VALUES_PATH)
    async def token_values(request: TextRequest, http: Request) -> dict[str, list[float]]:
        """Tokens to expect after each token of this text."""
        return {"predicted_tokens": await values(request, http)}

    @app.delete(wire.SESSIONS_PATH + "/{name}", status_code=204)
    async def close(name: str, http: Request) -> None:
        """Forget a session."""
        job = Job([], [_own(http, name)])
        await run(job, http)
        if not job.found:
            raise UnknownSessionError(f"no session {name!r}", "id")

    @app.get(wire.MODEL_PATH)
    async def model() -> dict[str, Any]:
        """Facts of the value model and limits of the server."""
        served.check_open()
        facts: dict[str, Any] = msgspec.to_builtins(model_info(served))
        return facts

    @app.get("/health")
    async def health() -> Response:
        """200 while the server answers."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def is_ready() -> Response:
        """200 while step requests are served; before that the model loads and nobody listens."""
        if not served.alive:
            why = "shutting down" if served.draining else "the engine's thread does not run"
            return error_response(503, "not_ready", why, None)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """Prometheus text format."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")

    return app


async def while_connected(
    future: "asyncio.Future[T]", receive: Receive, patience: float = PATIENCE_SECONDS
) -> T:
    """The future's result. Raises ClientGoneError, the future cancelled, if the client leaves.

    `receive` has given the whole body already, so that all it can still tell is a disconnect.
    """
    try:
        done, _ = await asyncio.wait([future], timeout=patience)
        if not done:
            gone = asyncio.ensure_future(_disconnect(receive))
            either: list[asyncio.Future[Any]] = [future, gone]
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
        if not future.done():
            raise ClientGoneError("the client has left")
        return future.result()
    finally:
        future.cancel()  # nothing, if it is done


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def model_info(served: Served) -> wire.ModelInfo:
    """What `GET /v1/model` tells."""
    engine = served.engine
    lenvm = engine.model.lenvm
    return wire.ModelInfo(
        gamma=served.gamma,
        base_model=lenvm.base_model,
        tokenizer_fingerprint=lenvm.tokenizer_fingerprint,
        vocab_size=served.vocab_size,
        max_position=served.max_position,
        max_sessions=engine.cache.max_sessions,
        max_candidates=engine.max_candidates,
    )


def error_response(status: int, kind: str, message: str, field: str | None) -> Response:
    """The one form of an error."""
    content = {"error": {"type": kind, "message": message, "field": field}}
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse(content, status, headers)


def _own(http: Request, session: str) -> str:
    """The session's name among those of all clients: nobody reaches another's."""
    return f"{http.state.client} {session}"


def _rows(message: wire.StepRequest, http: Request) -> list[StepRow]:
    """The message's flat rows, cut up."""
    tokens = wire.unpack_ids(message.tokens).tolist()
    candidates = wire.unpack_ids(message.candidates).tolist()
    rows, t, k = [], 0, 0
    for name, start, n, m in zip(
        message.sessions,
        message.starts,
        message.token_counts,
        message.candidate_counts,
        strict=True,
    ):
        rows.append(StepRow(_own(http, name), start, tokens[t : t + n], candidates[k : k + m]))
        t, k = t + n, k + m
    return rows
