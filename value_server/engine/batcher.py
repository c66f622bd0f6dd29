"""One thread owns the engine; everything that waits goes into its next forward pass.

A job whose future is cancelled, because its caller has left, is not computed any further.

    submit ─▶ inbox ─▶ waiting ─admit─▶ active ─advance, pass by pass─▶ answered
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from value_server.engine.engine import Engine
from value_server.engine.errors import BusyError, ModelError, RequestError
from value_server.engine.job import Job, JobResult

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # between looks for abandoned sessions


class Batcher:
    """Runs jobs on `engine`, of which it holds `max_waiting` at most, finished ones not counted.

    `on_pass(queries, jobs, seconds)` is told of every forward pass.
    """

    def __init__(
        self,
        engine: Engine,
        max_waiting: int = 1024,
        on_pass: Callable[[int, int, float], None] = lambda *_: None,
    ) -> None:
        self.engine = engine
        self.max_waiting = max_waiting
        self.on_pass = on_pass
        self.draining = False  # what runs is finished, what comes is refused
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # None: the last
        self._waiting: list[Job] = []
        self._active: list[Job] = []
        self._lock = threading.Lock()  # over `_taken` and what goes into the inbox
        self._taken = 0
        self._left = 0  # the engine's thread alone counts it
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="value-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """Refuse what comes from now on, and finish what is there. For signal handlers: no lock."""
        self.draining = True

    def stop(self) -> None:
        """Finish the current pass, fail what waits, end the thread."""
        with self._lock:
            self.draining = True
            self._inbox.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether jobs are served."""
        return self._thread.is_alive() and not self.draining

    @property
    def depth(self) -> int:
        """Jobs that are not finished."""
        return self._taken - self._left

    def submit(self, job: Job) -> "Future[JobResult]":
        """Queue a job. Raises RequestError at once if it can never be served or the queue is full.

        The future fails with BusyError, ModelError or nothing else. To cancel it is to leave.
        """
        self.engine.check(job.rows)
        with self._lock:  # else two callers could share the last place
            if self.draining:
                raise BusyError("the server is shutting down")
            if self.depth >= self.max_waiting:
                raise BusyError(f"{self.max_waiting} requests wait already")
            self._put(job)
        return job.future

    def forget(self, name: str) -> None:
        """Close a session some time soon; nobody waits for it, and it is never refused."""
        with self._lock:
            self._put(Job([], [name]))

    def _put(self, job: Job) -> None:
        job.submitted = time.perf_counter()
        self._taken += 1
        self._inbox.put(job)

    def _loop(self) -> None:
        while not self._stopped:
            try:
                self._receive()
                self._forsake()
                self.engine.cache.expire()
                self._admit()
                if self._active:
                    self._advance()
            except Exception:
                # Not the model (that is handled below): a bug of ours. Serve on without the jobs.
                log.exception("value engine: unexpected error")
                for job in list(self._active):
                    self._end(job, ModelError("internal error of the value engine"))
        for job in [*self._active, *self._waiting]:
            self._end(job, BusyError("the server is shutting down"))

    def _receive(self) -> None:
        """Take everything out of the inbox; wait for something if there is nothing to do."""
        with suppress(queue.Empty):
            idle = not (self._active or self._waiting)
            job = self._inbox.get(block=idle, timeout=IDLE_SECONDS)
            while True:
                if job is None:
                    self._stopped = True
                else:
                    self._waiting.append(job)
                job = self._inbox.get_nowait()

    def _forsake(self) -> None:
        """Drop the jobs whose callers have left."""
        for job in [*self._waiting, *self._active]:
            if job.future.cancelled():
                self._end(job, BusyError("its caller has left"))

    def _admit(self) -> None:
        """Waiting → active, in order; a job waits while an earlier one touches its sessions."""
        touched = {name for job in self._active for name in job.touched}
        full = False
        for job in list(self._waiting):
            if not full and touched.isdisjoint(job.touched):
                full = not self._try_admit(job)
            touched |= job.touched
        self._answer()

    def _try_admit(self, job: Job) -> bool:
        """False: no slots now, but active jobs will give some back."""
        try:
            self.engine.admit(job)
        except BusyError as error:
            if self._active:
                return False
            self._end(job, error)
        except Exception:
            log.exception("value engine: cannot admit a job")
            self._end(job, ModelError("internal error of the value engine"))
        else:
            job.queue_seconds = time.perf_counter() - job.submitted
            self._waiting.remove(job)
            self._active.append(job)
        return True

    def _advance(self) -> None:
        """One pass. If it fails for all jobs together, each has its own try."""
        try:
            self._forward(self._active)
        except Exception as error:
            log.warning("value engine: a pass of %d jobs failed: %r", len(self._active), error)
            for job in list(self._active):
                try:
                    self._forward([job])
                except Exception as own_error:
                    log.exception("value engine: forward pass failed")
                    self._end(job, ModelError(f"the forward pass failed: {own_error}"))
        self._answer()

    def _forward(self, jobs: Sequence[Job]) -> None:
        begin = time.perf_counter()
        queries = self.engine.advance(jobs)
        seconds = time.perf_counter() - begin
        self.on_pass(queries, len(jobs), seconds)
        for job in jobs:
            job.prefill_seconds += job.compute_seconds
            job.compute_seconds = seconds

    def _answer(self) -> None:
        """Answer the active jobs that are done."""
        for job in [job for job in self._active if self.engine.is_done(job)]:
            try:
                self._end(job, self.engine.result(job))
            except RequestError as error:
                self._end(job, error)

    def _end(self, job: Job, outcome: JobResult | RequestError) -> None:
        """The job, waiting or active, is over."""
        if job in self._active:
            self._active.remove(job)
            self.engine.release(job)
        else:
            self._waiting.remove(job)
        self._left += 1
        with suppress(InvalidStateError):  # the caller has left
            if isinstance(outcome, RequestError):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)
