"""The checkpoint in use, and the one before it for as long as its sessions last.

A session stays on the checkpoint that it began on: its text would have to be computed anew, and
its values would jump. Lengths are told in one gamma, that of the first checkpoint, whatever the
others were trained with, so that no client has to notice.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from value_server.contract.values import logit_in_gamma
from value_server.engine.batcher import Batcher
from value_server.engine.engine import Engine
from value_server.engine.errors import BusyError
from value_server.engine.job import Job, JobResult

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between looks whether the old checkpoint is still needed


@dataclass(frozen=True)
class Part:
    """The rows of a job that one engine answers, and their numbers in it."""

    batcher: Batcher
    job: Job
    rows: list[int]


class Served:
    """Runs jobs; `switch` brings another checkpoint without dropping a session."""

    def __init__(self, engine: Engine, begin: Callable[[Engine], Batcher]) -> None:
        """begin: makes the batcher of an engine."""
        self._begin = begin
        self._now = begin(engine)
        self._before: Batcher | None = None
        self.draining = False
        # What clients have been told, for as long as the server runs.
        self.gamma = engine.gamma
        self.max_position = engine.max_position
        self.vocab_size = engine.vocab_size

    @property
    def engine(self) -> Engine:
        """Of new sessions."""
        return self._now.engine

    @property
    def alive(self) -> bool:
        """Whether jobs are served."""
        return self._now.alive and not self.draining

    @property
    def depth(self) -> int:
        """Jobs that are not finished."""
        return sum(batcher.depth for batcher in self._batchers)

    @property
    def _batchers(self) -> list[Batcher]:
        return [self._now, *([self._before] if self._before else [])]

    def start(self) -> None:
        self._now.start()

    def stop(self) -> None:
        """See Batcher.stop."""
        for batcher in self._batchers:
            batcher.stop()

    def drain(self) -> None:
        """Finish what is there, refuse what comes."""
        self.draining = True

    def forget(self, name: str) -> None:
        """See Batcher.forget."""
        for batcher in self._batchers:
            batcher.forget(name)

    def check_open(self) -> None:
        """Raises BusyError while the server drains."""
        if self.draining:
            raise BusyError("the server is shutting down")

    def parts(self, job: Job) -> list[Part]:
        """The job by checkpoints; one part, the job itself, but while an old one is still there."""
        if self._before is None:
            return [Part(self._now, job, list(range(len(job.steps))))]
        held = self._before.engine.cache.sessions
        old = [row for row, step in enumerate(job.steps) if step.start and step.session in held]
        new = [row for row in range(len(job.steps)) if row not in old]
        again = [job.steps[row].session for row in new]  # a text from its start begins anew
        ended = [name for name in [*job.closed, *again] if name in held]
        both = [
            Part(self._before, job.only(old, ended), old),
            Part(self._now, job.only(new, job.closed), new),
        ]
        return [part for part in both if part.job.touched] or [both[1]]

    async def run(
        self, job: Job, wait: Callable[["asyncio.Future[list[JobResult]]"], Awaitable[Any]]
    ) -> JobResult:
        """The job's result, for which `wait` waits. Raises RequestError, see Batcher.submit."""
        self.check_open()
        parts = self.parts(job)
        futures = [asyncio.wrap_future(part.batcher.submit(part.job)) for part in parts]
        results = await wait(asyncio.gather(*futures))
        if len(parts) == 1 and parts[0].batcher.engine.gamma == self.gamma:
            return results[0]
        return self._merged(job, parts, results)

    async def switch(self, engine: Engine) -> None:
        """New sessions begin on `engine`; return when the last old one is over.

        Raises ValueError where clients would notice more than other values.
        """
        self.check(engine)
        self._before, self._now = self._now, self._begin(engine)
        self._now.start()
        log.info("new sessions begin on the new checkpoint")
        while self._before.engine.cache.sessions or self._before.depth:
            await asyncio.sleep(LOOK_S)
        before, self._before = self._before, None
        await asyncio.to_thread(before.stop)
        log.info("the old checkpoint is gone with its last session")

    def check(self, engine: Engine) -> None:
        """Raises ValueError if `engine` cannot follow the first one."""
        if self._before is not None:
            raise ValueError("sessions are still on the checkpoint before this one")
        ours, theirs = self.engine.model.lenvm, engine.model.lenvm
        if ours.tokenizer_fingerprint != theirs.tokenizer_fingerprint:
            raise ValueError("tokenizer_fingerprint: the new checkpoint is for another tokenizer")
        for name in ("vocab_size", "max_position"):
            least, got = getattr(self, name), getattr(engine, name)
            if got < least:
                raise ValueError(f"{name}: {got} in the new checkpoint, clients count on {least}")

    def _merged(self, job: Job, parts: list[Part], results: list[JobResult]) -> JobResult:
        """In the order of the job's rows, and in our gamma."""
        logits: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(job.steps)
        unknown: list[int] = []
        for part, result in zip(parts, results, strict=True):
            gamma = part.batcher.engine.gamma
            counts = [len(step.candidates) for step in part.job.steps]
            own = np.split(in_gamma(result.logits, gamma, self.gamma), np.cumsum(counts))
            for row, z in zip(part.rows, own, strict=False):  # the last piece is empty
                logits[row] = z
            unknown += [part.rows[row] for row in result.unknown]
            job.follow(part.job)
        texts = [
            in_gamma(z, part.batcher.engine.gamma, self.gamma)
            for part, result in zip(parts, results, strict=True)
            for z in result.texts
        ]
        flat = np.concatenate(logits) if logits else np.empty(0, np.float32)
        return JobResult(flat, unknown, texts)


def in_gamma(z: NDArray[np.float32], theirs: float, ours: float) -> NDArray[np.float32]:
    if theirs == ours:
        return z
    exact = torch.from_numpy(z.astype(np.float64))
    return logit_in_gamma(exact, theirs, ours).numpy().astype(np.float32)
