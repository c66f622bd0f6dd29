"""The routes, and what they share: one `Shared` an application, made in app.py."""

import asyncio
import hashlib
import math
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from value_server.contract import wire
from value_server.contract.values import length_from_logit
from value_server.engine.batcher import Batcher
from value_server.engine.engine import Engine
from value_server.engine.errors import (
    BusyError,
    ClientGoneError,
    RequestError,
    UnknownSessionError,
)
from value_server.engine.job import Job, JobResult, Row
from value_server.engine.keys import lookahead_keys as keys_of
from value_server.http.metrics import Metrics
from value_server.http.telemetry import log_refusal
from value_server.http.text import Prediction, TextRequest, Texts

LOOK_SECONDS = 0.2  # between looks whether anybody still waits; a step is faster

router = APIRouter()


@dataclass(frozen=True)
class Shared:
    """What the routes of one application share."""

    batcher: Batcher
    metrics: Metrics
    texts: Texts
    info: wire.ModelInfo
    keys: bytes | None  # the message of the lookahead keys; None: the model has none

    async def run(self, job: Job, http: Request, end: float | None = None) -> JobResult:
        """The job's result; what there is of it at `end` (time.perf_counter), if that is given.

        Raises RequestError; ClientGoneError, the job cancelled, if the client leaves.
        """
        future = asyncio.wrap_future(self.batcher.submit(job))
        try:
            while True:
                left = math.inf if end is None else end - time.perf_counter()
                done, _ = await asyncio.wait([future], timeout=max(0.0, min(left, LOOK_SECONDS)))
                if done:
                    return future.result()
                if left <= LOOK_SECONDS:
                    return self.batcher.leave(job)
                if await http.is_disconnected():
                    raise ClientGoneError("the client has left")
        finally:
            if not job.left:
                future.cancel()  # nothing, if it is done

    async def lengths(self, request: TextRequest, http: Request) -> list[float]:
        """Tokens to expect after each token of the text."""
        ids = await run_in_threadpool(self.texts.ids, request)
        name = own(http, f"text-{uuid.uuid4()}")
        job = Job([Row(name, 0, ids)], texts=True, client=http.state.client)
        try:
            result = await self.run(job, http)
        except RequestError as error:
            if error.field != "tokens":
                raise
            message = error.message.replace("tokens", request.given, 1)  # as the client calls them
            raise RequestError(message, request.given) from error
        z = torch.from_numpy(result.texts[0])
        lengths: list[float] = length_from_logit(z.double(), self.info.gamma).tolist()
        return lengths


def shared(http: Request) -> Shared:
    """Of the application that the request came to."""
    found: Shared = http.app.state.shared
    return found


@router.post(wire.STEP_PATH)
async def step(http: Request) -> Response:
    """Score candidates. Body and answer: msgpack, see value_server/contract/wire.py."""
    server = shared(http)
    body = await http.body()
    begin = time.perf_counter()
    message = wire.decode_request(body)
    http.state.sessions = message.sessions
    check_rank(message, server.info)
    budget = None if message.budget_ms is None else message.budget_ms / 1e3
    job = Job(
        list(rows_of(message, http)),
        [own(http, name) for name in message.closed],
        client=http.state.client,
        budget=budget,
        left=budget == 0,
    )
    decoded = time.perf_counter()
    result = await server.run(job, http, begin + budget if budget else None)
    answered = time.perf_counter()
    reply = wire.StepReply(
        model_id=server.info.model_id,
        logits=wire.pack_logits(result.logits),
        queries=wire.pack_queries(result.queries),
        held=result.held,
        refused={row: str(why)[: wire.LONGEST_REASON] for row, why in result.refused.items()},
    )
    content = wire.encode(reply)
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
    tokens = (await shared(http).lengths(request, http))[-1]
    return await run_in_threadpool(shared(http).texts.prediction, request, tokens)


@router.post(wire.VALUES_PATH)
async def token_values(request: TextRequest, http: Request) -> dict[str, list[float]]:
    """Tokens to expect after each token of this text, as /v1/predict does after the last."""
    return {"predicted_tokens": await shared(http).lengths(request, http)}


@router.delete(wire.SESSIONS_PATH + "/{name}", status_code=204)
async def close(name: str, http: Request) -> None:
    """End a session; its text is kept until its slots are wanted."""
    job = Job([], [own(http, name)])
    await shared(http).run(job, http)
    if not job.found:
        raise UnknownSessionError(f"no session {name!r}", "id")


@router.get(wire.MODEL_PATH)
async def model(http: Request) -> dict[str, Any]:
    """Facts of the value model and limits of the server."""
    server = shared(http)
    if server.batcher.draining:  # else a plugin would think that it is back
        raise BusyError("the server is shutting down")
    facts: dict[str, Any] = msgspec.to_builtins(server.info)
    return facts


@router.get(wire.KEYS_PATH)
async def lookahead_keys(http: Request) -> Response:
    """What queries are multiplied with, once per model_id: msgpack, see the same file; 404 where
    the model has no lookahead head."""
    keys = shared(http).keys
    if keys is None:
        raise HTTPException(404, "the model has no lookahead head")
    return Response(keys, media_type=wire.MEDIA_TYPE)


@router.get("/health")
async def health(http: Request) -> Response:
    """200 while the engine gets on; where it does not, only a new process helps."""
    if not shared(http).batcher.works:
        return error_response(503, "broken", "the engine does not work any more", None)
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def is_ready(http: Request) -> Response:
    """200 while step requests are served; before that the model loads and nobody listens."""
    batcher = shared(http).batcher
    if not batcher.ready:
        why = "shutting down" if batcher.works else "the engine does not work any more"
        return error_response(503, "not_ready", why, None)
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
async def show_metrics(http: Request) -> Response:
    """Prometheus text format."""
    return Response(shared(http).metrics.render(), media_type="text/plain; version=0.0.4")


def model_facts(engine: Engine) -> tuple[wire.ModelInfo, wire.LookaheadKeys | None]:
    """What `GET /v1/model` and `GET /v1/lookahead-keys` tell."""
    lenvm = engine.model.lenvm
    info = wire.ModelInfo(
        gamma=lenvm.gamma,
        base_model=lenvm.base_model,
        base_fingerprint=lenvm.base_fingerprint,
        tokenizer_fingerprint=lenvm.tokenizer_fingerprint,
        vocab_size=engine.vocab_size,
        max_position=engine.max_position,
        max_sessions=engine.cache.max_sessions,
        max_candidates=engine.max_candidates,
        lookahead_rank=engine.lookahead_rank,
    )
    head = engine.lookahead
    packed = wire.pack_keys(keys_of(engine.model, head)) if head else b""
    digest = hashlib.blake2b(msgspec.json.encode(info), digest_size=8)
    digest.update(packed)  # those of another checkpoint are never taken for these
    info = msgspec.structs.replace(info, model_id=digest.hexdigest())
    if not head:
        return info, None
    return info, wire.LookaheadKeys(model_id=info.model_id, rank=head.rank, keys=packed)


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


def own(http: Request, session: str) -> str:
    """The session's name among those of all clients: nobody reaches another's."""
    return f"{http.state.client} {session}"


def rows_of(message: wire.StepRequest, http: Request) -> Iterator[Row]:
    """The message's flat arrays, cut up."""
    tokens = wire.unpack_ids(message.tokens).tolist()
    candidates = wire.unpack_ids(message.candidates).tolist()
    t = k = 0
    for name, start, n, m in zip(
        message.sessions,
        message.starts,
        message.token_counts,
        message.candidate_counts,
        strict=True,
    ):
        yield Row(
            own(http, name),
            start,
            tokens[t : t + n],
            candidates[k : k + m],
            message.lookahead_rank,
        )
        t, k = t + n, k + m
