"""One thread owns the engine; everything that waits goes into its next forward pass.

    submit ─▶ inbox ─▶ waiting ─admit─▶ active ─advance, pass by pass─▶ answered

A job whose future is cancelled, because its caller has gone, is not computed any further. One that
is left, because its caller waits no longer, is: when the same sessions are asked for again, their
texts are there, or nearly.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

import torch

from value_server.engine.engine import Engine
from value_server.engine.errors import BusyError, ModelError, PassFailedError, RequestError
from value_server.engine.job import Job, JobResult
from value_server.engine.looker import Looker

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # between looks for abandoned sessions
STUCK_S = 300.0  # a forward pass that takes longer will not end


class Batcher:
    """Runs jobs on `engine`, of which it holds `max_waiting` at most, finished ones not counted.

    Those that only close sessions are taken beyond that: they need no pass, and make room.

    `on_pass(queries, jobs, seconds)` is told of every forward pass. name: of the model, to log.
    """

    def __init__(
        self,
        engine: Engine,
        max_waiting: int = 1024,
        on_pass: Callable[[int, int, float], None] = lambda *_: None,
        name: str = "",
    ) -> None:
        self.engine = engine
        self.max_waiting = max_waiting
        self.on_pass = on_pass
        self.draining = False  # what runs is finished, what comes is refused
        self.pace = engine.pace
        self.looker = Looker(engine.showing) if engine.showing else None
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # None: the last
        self._waiting: list[Job] = []
        self._active: list[Job] = []
        self._lock = threading.Lock()  # over `_taken` and what goes into the inbox
        self._taken = 0
        self._left = 0  # the engine's thread alone counts it
        self._stopped = False
        self._pass_began: float | None = None
        self._name = f"value engine {name}".rstrip()
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._loop, name="value-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """Refuse what comes from now on, and finish what is there. For signal handlers: no lock."""
        self.draining = True
        if self.looker:
            self.looker.drain()

    def stop(self) -> None:
        """Finish the current pass, fail what waits, end the thread; do not wait for a stuck one."""
        with self._lock:
            self.drain()
            self._inbox.put(None)
        if self.looker:
            self.looker.stop()
        self._thread.join(None if self.works else 0)

    @property
    def works(self) -> bool:
        """Whether the thread is there and gets on; where it does not, only a new process helps."""
        began = self._pass_began
        stuck = began is not None and time.perf_counter() - began > STUCK_S
        return self._thread.is_alive() and not stuck and not self.pace.broken

    @property
    def ready(self) -> bool:
        """Whether jobs are served."""
        return self.works and not self.draining

    @property
    def depth(self) -> int:
        """Jobs that are not finished."""
        return self._taken - self._left

    def submit(self, job: Job) -> "Future[JobResult]":
        """Queue a job. Raises RequestError at once if it cannot be served.

        Rows of steps that cannot be served are refused one by one, and where the queue is full
        they have no values; texts raise. The future fails with BusyError, ModelError or nothing
        else. To cancel it is to leave nothing behind.
        """
        self.engine.check(job.rows)
        if job.texts:
            for row in job.rows:
                if row.refused:
                    raise row.refused
        self.pace.asked(job.budget)
        with self._lock:  # else two callers could share the last place
            if self.draining:
                raise BusyError("the server is shutting down")
            if self.depth < self.max_waiting or not job.rows:
                self._put(job)
            elif job.texts:
                raise BusyError(f"{self.max_waiting} requests wait already")
            else:
                if job.closed:  # nobody tells them a second time
                    self._put(Job([], job.closed))
                job.future.set_result(job.answer())
        return job.future

    def leave(self, job: Job) -> JobResult:
        """What the job has now; its caller waits no longer, and its texts are computed on."""
        answer = job.answer()
        job.left = True
        if not job.queue_seconds:  # it has waited until now
            job.queue_seconds = time.perf_counter() - job.submitted
        return answer

    def _put(self, job: Job) -> None:
        job.submitted = time.perf_counter()
        self._taken += 1
        self._inbox.put(job)

    def _loop(self) -> None:
        torch.set_num_threads(self._threads)  # else those of a looker that began before
        while not self._stopped and not self.pace.broken:
            try:
                self.turn()
            except Exception:
                # Not the model (that is handled below): a bug of ours. Serve on without the jobs.
                log.exception("%s: unexpected error", self._name)
                self.pace.fails(0)
                for job in list(self._active):
                    self._end(job, ModelError("internal error of the value engine"))
        if self.pace.broken:
            failed = self.pace.failures
            log.error("%s: %d passes in a row failed: it is broken", self._name, failed)
        with self._lock:
            self.drain()
        self._receive()
        for job in [*self._active, *self._waiting]:
            self._end(job, BusyError("the server is shutting down"))

    def turn(self) -> None:
        """What the thread does again and again; at most one pass."""
        self._receive()
        self._forsake()
        self.engine.cache.expire()
        self._admit()
        if self._active:
            self._advance()

    def _receive(self) -> None:
        """Take everything out of the inbox; wait for something if there is nothing to do."""
        with suppress(queue.Empty):
            idle = not (self._active or self._waiting or self._stopped or self.pace.broken)
            job = self._inbox.get(block=idle, timeout=IDLE_SECONDS)
            while True:
                if job is None:
                    self._stopped = True
                else:
                    self._waiting.append(job)
                job = self._inbox.get_nowait()

    def _forsake(self) -> None:
        """Drop the jobs whose callers are gone, and what those want no more who have left."""
        for job in [*self._waiting, *self._active]:
            if job.future.cancelled() or (job.left and self.draining):
                self._end(job, BusyError("its caller has left"))
            elif job.left and job in self._active:
                self.engine.leave(job)

    def _admit(self) -> None:
        """Waiting → active, in order; a job waits while an earlier one touches its sessions.

        Those who have left hold nobody up.
        """
        touched = {name for job in self._active if not job.left for name in job.touched}
        for job in list(self._waiting):
            names = job.touched
            if touched.isdisjoint(names):
                self._try_admit(job, names)
            if not job.left:
                touched |= names
        self._answer()

    def _try_admit(self, job: Job, names: set[str]) -> None:
        """Waiting → active, unless a text has to wait for slots. names: those it touches."""
        for other in self._earlier(job):
            if other.left:
                self.engine.drop(other, names)
        try:
            self.engine.admit(job)
        except Exception:
            log.exception("%s: cannot admit a job", self._name)
            self.engine.release(job)
            self._end(job, ModelError("internal error of the value engine"))
            return
        if refused := next((row.refused for row in job.rows if job.texts and row.refused), None):
            self.engine.release(job)
            self._end(job, refused)
            return
        if job.texts and not all(row.session for row in job.rows):
            if not any(other.texts for other in self._active):
                self._end(job, BusyError("all slots or sessions are in use: try again"))
            return
        job.queue_seconds = time.perf_counter() - job.submitted
        self._waiting.remove(job)
        self._active.append(job)
        if job.left:
            self._tell(job, job.answer())

    def _earlier(self, job: Job) -> list[Job]:
        return [*self._active, *self._waiting[: self._waiting.index(job)]]

    def _advance(self) -> None:
        """One pass, of those first who wait for it."""
        begin = self._pass_began = time.perf_counter()
        try:
            jobs = sorted(self._active, key=lambda job: job.left)
            queries = self.engine.advance(jobs)
        except PassFailedError as failure:
            self._bear(failure)
        else:
            seconds = time.perf_counter() - begin
            self.pace.worked(queries, seconds)
            self.on_pass(queries, len(jobs), seconds)
            for job in jobs:
                job.prefill_seconds += job.compute_seconds
                job.compute_seconds = seconds
        finally:
            self._pass_began = None
        self._answer()

    def _bear(self, failure: PassFailedError) -> None:
        """The next pass is smaller; a row that fails alone, and nothing else does, is refused."""
        log.warning("%s: %s", self._name, failure)
        if self.pace.fails(failure.queries) and self.engine.works():
            self.pace.failures = 0
            for row in failure.rows:
                self.engine.refuse(row, f"the forward pass failed: {failure.__cause__}")

    def _answer(self) -> None:
        """Answer the active jobs that are settled."""
        for job in [job for job in self._active if self.engine.settle(job)]:
            without = [row for row in job.rows if row.z is None] if job.texts else []
            lost = BusyError("its slots went to others: try again")
            self._end(job, (without[0].refused or lost) if without else job.answer())
        for job in self._active:
            if job.budget and not job.left and self.engine.only_prefills(job):
                self._tell(job, self.leave(job))

    def _end(self, job: Job, outcome: JobResult | RequestError) -> None:
        """The job, waiting or active, is over."""
        if job in self._active:
            self._active.remove(job)
            self.engine.release(job)
        else:
            self._waiting.remove(job)
        self._left += 1
        self._tell(job, job.answer() if job.left else outcome)

    def _tell(self, job: Job, outcome: JobResult | RequestError) -> None:
        with suppress(InvalidStateError):  # the caller is gone, or has its answer
            if isinstance(outcome, RequestError):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)
