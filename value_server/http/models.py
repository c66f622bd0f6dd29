"""The value models of a server, each with slots and a thread of its own, and which of them a
request is for: what one of them does wrong, or cannot do any more, is no matter of the others."""

import asyncio
import hashlib
import math
import time
import uuid
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import msgspec
import torch
from fastapi import Request
from starlette.concurrency import run_in_threadpool

from value_server.contract import wire
from value_server.contract.values import length_from_logit
from value_server.engine.batcher import Batcher
from value_server.engine.engine import Engine
from value_server.engine.errors import ClientGoneError, RequestError, UnknownModelError
from value_server.engine.job import Job, JobResult, Row
from value_server.engine.keys import lookahead_keys as keys_of
from value_server.engine.pictures import MOST_PIXELS
from value_server.http.metrics import Metrics
from value_server.http.pictures import Intake
from value_server.http.text import TextRequest, Texts

T = TypeVar("T")

LOOK_SECONDS = 0.2  # between looks whether anybody still waits; a step is faster


@dataclass(frozen=True)
class ServedModel:
    """What the routes need of one model."""

    batcher: Batcher
    metrics: Metrics
    texts: Texts
    intake: Intake
    info: wire.ModelInfo
    keys: bytes | None  # the message of the lookahead keys; None: the model has none

    @classmethod
    def of(
        cls,
        engine: Engine,
        texts: Texts,
        max_waiting: int = 1024,
        name: str = "",
        *,
        picture_pixels: int = MOST_PIXELS,
        picture_token: int = -1,
    ) -> Self:
        """`engine` should be warm already (Engine.warm_up). name: for the log. picture_pixels: of
        a picture at most. picture_token: that of the base model, if the engine sees none."""
        info, keys = model_facts(engine, picture_token)
        metrics = Metrics(engine)
        batcher = Batcher(engine, max_waiting, metrics.on_pass, name)
        intake = Intake(batcher, picture_pixels)
        return cls(batcher, metrics, texts, intake, info, wire.encode(keys) if keys else None)

    async def run(self, job: Job, http: Request, end: float | None = None) -> JobResult:
        """The job's result; what there is of it at `end` (time.perf_counter), if that is given.

        Raises RequestError; ClientGoneError, the job cancelled, if the client leaves.
        """
        future = asyncio.wrap_future(self.batcher.submit(job))
        try:
            if await _attended(future, http, end):
                return future.result()
            return self.batcher.leave(job)
        finally:
            if not job.left:
                future.cancel()  # nothing, if it is done

    async def take(self, digest: str, http: Request) -> None:
        """Hold the picture in the request's body. Raises RequestError; ClientGoneError, the picture
        dropped if its turn has not come, if the client leaves."""
        await _unless_gone(self.intake.take(digest, await http.body()), http)

    async def lengths(self, request: TextRequest, http: Request) -> list[float]:
        """Tokens to expect after each token of the text."""
        ids = await run_in_threadpool(self.texts.ids, request)
        pictures = await _unless_gone(self.intake.take_all(request.shown), http)
        if pictures and request.token_ids is None:
            ids = self.intake.widened(ids, pictures, request.given)
        name = own(http, f"text-{uuid.uuid4()}")
        job = Job([Row(name, 0, ids, pictures=pictures)], texts=True, client=http.state.client)
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


class Models:
    """name → its model. That of the name "" has none: its routes begin with nothing before /v1."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._models = dict(models)
        self.draining = False

    def asked(self, http: Request) -> ServedModel:
        """The one that the request's path names. Raises UnknownModelError."""
        name = name_of(http)
        if (found := self._models.get(name)) is None:
            names = [known or f"one without a name ({wire.MODEL_PATH})" for known in self._models]
            what = f"no model {name!r}" if name else f"{http.url.path}: names no model"
            raise UnknownModelError(
                f"{what}; this server has, at {wire.model_path('NAME')}/…: {', '.join(names)}"
            )
        return found

    def spoken_of(self, http: Request) -> list[ServedModel]:
        """The one that the path names; where it names none, all. Raises UnknownModelError."""
        return [self.asked(http)] if name_of(http) else list(self._models.values())

    def start(self) -> None:
        for model in self._models.values():
            model.batcher.start()

    def stop(self) -> None:
        for model in self._models.values():
            model.batcher.stop()

    def drain(self) -> None:
        """See Batcher."""
        self.draining = True
        for model in self._models.values():
            model.batcher.drain()

    @property
    def ended(self) -> set[str]:
        """Names of those that do not work any more."""
        return {name for name, model in self._models.items() if not model.batcher.works}

    @property
    def works(self) -> bool:
        """Whether any of them does."""
        return len(self.ended) < len(self._models)

    @property
    def depth(self) -> int:
        """Requests that are not finished, and will be."""
        batchers = [model.batcher for model in self._models.values()]
        return sum(batcher.depth for batcher in batchers if batcher.works)


def name_of(http: Request) -> str:
    """The name in the request's path; "" where there is none."""
    return str(http.path_params.get("model", ""))


def model_facts(
    engine: Engine, picture_token: int = -1
) -> tuple[wire.ModelInfo, wire.LookaheadKeys | None]:
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
        sees_pictures=engine.showing is not None,
        picture_token=engine.showing.sight.placeholder if engine.showing else picture_token,
    )
    head = engine.lookahead
    packed = wire.pack_keys(keys_of(engine.model, head)) if head else b""
    digest = hashlib.blake2b(msgspec.json.encode(info), digest_size=8)
    digest.update(packed)  # those of another checkpoint are never taken for these
    info = msgspec.structs.replace(info, model_id=digest.hexdigest())
    if not head:
        return info, None
    return info, wire.LookaheadKeys(model_id=info.model_id, rank=head.rank, keys=packed)


async def _attended(future: "asyncio.Future[Any]", http: Request, end: float | None = None) -> bool:
    """Whether the future is done by `end` (time.perf_counter), if that is given.

    Raises ClientGoneError if the client leaves before.
    """
    while True:
        left = math.inf if end is None else end - time.perf_counter()
        done, _ = await asyncio.wait([future], timeout=max(0.0, min(left, LOOK_SECONDS)))
        if done or left <= LOOK_SECONDS:
            return bool(done)
        if await http.is_disconnected():
            raise ClientGoneError("the client has left")


async def _unless_gone(work: Coroutine[Any, Any, T], http: Request) -> T:
    """What the work gives. Raises ClientGoneError, the work cancelled, if the client leaves."""
    task = asyncio.create_task(work)
    try:
        await _attended(task, http)
        return task.result()
    finally:
        task.cancel()


def own(http: Request, session: str) -> str:
    """The session's name among those of all clients: nobody reaches another's."""
    return f"{http.state.client} {session}"
