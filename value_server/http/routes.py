"""The routes. Each is there twice: by itself, and behind the name of a model."""

import time
from collections.abc import Iterator
from typing import Any

import msgspec
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from value_server.contract import wire
from value_server.engine.errors import BusyError, RequestError, UnknownSessionError
from value_server.engine.job import Job, JobResult, Row
from value_server.http.models import Models, ServedModel, own
from value_server.http.telemetry import log_refusal
from value_server.http.text import Prediction, TextRequest

router = APIRouter()

# A message that waits for no values is answered by then, its texts taken or not: none are taken in
# a pass, and behind a long one the plugin would think that the server is lost.
UNTAKEN_S = 0.5


def models(http: Request) -> Models:
    """Of the application that the request came to."""
    found: Models = http.app.state.models
    return found


def asked(http: Request) -> ServedModel:
    """See Models."""
    return models(http).asked(http)


@router.post(wire.STEP_PATH)
async def step(http: Request) -> Response:
    """Score candidates. Body and answer: msgpack, see value_server/contract/wire.py."""
    server = asked(http)
    body = await http.body()
    begin = time.perf_counter()
    message = wire.decode_request(body)
    http.state.sessions = message.sessions
    check_rank(message, server.info)
    budget = None if message.budget_ms is None else message.budget_ms / 1e3
    job = Job(
        list(rows_of(message, own(http, ""))),
        [own(http, name) for name in message.closed],
        client=http.state.client,
        budget=budget,
        left=budget == 0,
    )
    decoded = time.perf_counter()
    end = None if budget is None else begin + (budget or UNTAKEN_S)
    result = await server.run(job, http, end)
    answered = time.perf_counter()
    content = wire.encode(reply_of(result, server.info.model_id))
    end = time.perf_counter()
    for row, why in result.refused.items():
        log_refusal(http, why, message.sessions[row])
    server.metrics.on_step(job, result, decoded - begin + end - answered, end - begin)
    return Response(content, media_type=wire.MEDIA_TYPE)


@router.post(wire.PREDICT_PATH)
async def predict(request: TextRequest, http: Request) -> Prediction:
    """The length to expect after this prompt, in tokens, words and characters.

    It is the length of the mean value, which lies below the mean length of many answers wherever
    they differ in length.
    """
    server = asked(http)
    tokens = (await server.lengths(request, http))[-1]
    return await run_in_threadpool(server.texts.prediction, request, tokens)


@router.post(wire.VALUES_PATH)
async def token_values(request: TextRequest, http: Request) -> dict[str, list[float]]:
    """Tokens to expect after each token of this text, as /v1/predict does after the last."""
    return {"predicted_tokens": await asked(http).lengths(request, http)}


@router.delete(wire.SESSIONS_PATH + "/{name}", status_code=204)
async def close(name: str, http: Request) -> None:
    """End a session; its text is kept until its slots are wanted."""
    job = Job([], [own(http, name)])
    await asked(http).run(job, http)
    if not job.found:
        raise UnknownSessionError(f"no session {name!r}", "id")


@router.put(wire.PICTURES_PATH + "/{digest}", status_code=204)
async def put_picture(digest: str, http: Request) -> None:
    """Hold the picture in the body, the file as it is (PNG, JPEG, WebP, …), by its sha256.

    Steps name it by that. 409 where the model reads text alone.
    """
    await asked(http).take(digest, http)


@router.head(wire.PICTURES_PATH + "/{digest}", status_code=204)
async def has_picture(digest: str, http: Request) -> None:
    """204 where the picture is here, and stays for a while; 404 where it has to be sent."""
    if not asked(http).intake.has(digest):
        raise HTTPException(404, "no such picture")


@router.get(wire.MODEL_PATH)
async def model(http: Request) -> dict[str, Any]:
    """Facts of the value model and limits of the server."""
    server = asked(http)
    if server.batcher.draining:  # else a plugin would think that it is back
        raise BusyError("the server is shutting down")
    facts: dict[str, Any] = msgspec.to_builtins(server.info)
    return facts


@router.get(wire.KEYS_PATH)
async def lookahead_keys(http: Request) -> Response:
    """What queries are multiplied with, once per model_id: msgpack, see the same file; 404 where
    the model has no lookahead head."""
    keys = asked(http).keys
    if keys is None:
        raise HTTPException(404, "the model has no lookahead head")
    return Response(keys, media_type=wire.MEDIA_TYPE)


@router.get("/health")
async def health(http: Request) -> Response:
    """200 while the engine gets on; where it does not, only a new process helps.

    Without the name of a model: while any of them does. Likewise the next one.
    """
    if not any(model.batcher.works for model in models(http).spoken_of(http)):
        return error_response(503, "broken", "the engine does not work any more", None)
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def is_ready(http: Request) -> Response:
    """200 while step requests are served; before that the model loads and nobody listens."""
    batchers = [model.batcher for model in models(http).spoken_of(http)]
    if not any(batcher.ready for batcher in batchers):
        works = any(batcher.works for batcher in batchers)
        why = "shutting down" if works else "the engine does not work any more"
        return error_response(503, "not_ready", why, None)
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
async def show_metrics(http: Request) -> Response:
    """Prometheus text format, of all models."""
    models(http).spoken_of(http)  # a name that is none is refused here, too
    return Response(http.app.state.figures.render(), media_type="text/plain; version=0.0.4")


def check_rank(message: wire.StepRequest, info: wire.ModelInfo) -> None:
    """Raises RequestError where the queries that are asked for are not those of the model."""
    if message.lookahead_rank not in (0, info.lookahead_rank):
        served = f"{info.lookahead_rank}" if info.lookahead_rank else "none"
        what = f"{message.lookahead_rank} is not the served one ({served})"
        raise RequestError(f"lookahead_rank: {what}", "lookahead_rank")


def error_response(status: int, kind: str, message: str, field: str | None) -> Response:
    """The one form of an error: {"error": {"type", "message", "field"}}."""
    content = {"error": {"type": kind, "message": message, "field": field}}
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse(content, status, headers)


def rows_of(message: wire.StepRequest, client: str) -> Iterator[Row]:
    """The message's flat arrays, cut up. client: what the names of its sessions begin with."""
    tokens = wire.unpack_ids(message.tokens).tolist()
    candidates = wire.unpack_ids(message.candidates).tolist()
    t = k = 0
    counts = zip(message.starts, message.token_counts, message.candidate_counts, strict=True)
    for row, (name, (start, n, m)) in enumerate(zip(message.sessions, counts, strict=True)):
        yield Row(
            client + name,
            start,
            tokens[t : t + n],
            candidates[k : k + m],
            message.lookahead_rank,
            message.pictures.get(row, ()),
        )
        t, k = t + n, k + m


def reply_of(result: JobResult, model_id: str) -> wire.StepReply:
    return wire.StepReply(
        model_id=model_id,
        logits=wire.pack_logits(result.logits),
        queries=wire.pack_queries(result.queries),
        held=result.held,
        refused={row: str(why)[: wire.LONGEST_REASON] for row, why in result.refused.items()},
    )
