"""One thread owns the engine; everything that waits goes into its next forward pass.

A job whose future is cancelled, because its caller has left, is not computed any further.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from value_server.engine.engine import Engine
from value_server.engine.errors import BusyError, ModelError, RequestError
from value_server.engine.job import Job, JobResult

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # between looks for abandoned sessions


@dataclass(slots=True, eq=False)
class _Entry:
    job: Job
    future: "Future[JobResult]" = field(default_factory=Future)
    submitted: float = field(default_factory=time.perf_counter)


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
        self._inbox: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._waiting: list[_Entry] = []
        self._active: list[_Entry] = []
        self._lock = threading.Lock()  # over these two
        self._stopping = False
        self._taken = 0
        self._left = 0  # the engine's thread alone counts it
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="value-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the current pass, fail what waits, end the thread."""
        with self._lock:
            self._stopping = True
            self._inbox.put(None)
        self._thread.join()

    def forget(self, name: str) -> None:
        """Close a session some time soon; nobody waits for it, and it is never refused."""
        with self._lock:
            self._taken += 1
            self._inbox.put(_Entry(Job([], [name])))

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def depth(self) -> int:
        """Jobs that are not finished."""
        return self._taken - self._left

    def submit(self, job: Job) -> "Future[JobResult]":
        """Queue a job. Raises RequestError at once if it can never be served or the queue is full.

        The future fails with BusyError, ModelError or nothing else. To cancel it is to leave.
        """
        self.engine.check(job.steps)
        entry = _Entry(job)
        with self._lock:  # else two callers could share the last place
            if self._stopping:
                raise BusyError("the server is shutting down")
            if self.depth >= self.max_waiting:
                raise BusyError(f"{self.max_waiting} requests wait already")
            self._taken += 1
            self._inbox.put(entry)
        return entry.future

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
                self._fail(list(self._active), ModelError("internal error of the value engine"))
        for entry in self._active + self._waiting:
            _fail_future(entry, BusyError("the server is shutting down"))

    def _receive(self) -> None:
        """Take everything out of the inbox; wait for something if there is nothing to do."""
        try:
            idle = not (self._active or self._waiting)
            entry = self._inbox.get(block=idle, timeout=IDLE_SECONDS)
            while True:
                if entry is None:
                    self._stopped = True
                else:
                    self._waiting.append(entry)
                entry = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _forsake(self) -> None:
        """Drop the jobs whose callers have left."""
        for entry in [e for e in self._waiting if e.future.cancelled()]:
            self._waiting.remove(entry)
            self._left += 1
        for entry in [e for e in self._active if e.future.cancelled()]:
            self._drop(entry)

    def _admit(self) -> None:
        """Waiting → active, in order; a job waits while an earlier one touches its sessions."""
        touched = {name for entry in self._active for name in entry.job.touched}
        waiting, self._waiting = self._waiting, []
        full = False
        for entry in waiting:
            if full or not touched.isdisjoint(entry.job.touched):
                self._waiting.append(entry)
            else:
                full = not self._try_admit(entry)
            touched |= entry.job.touched

    def _try_admit(self, entry: _Entry) -> bool:
        """False: no slots now, but active jobs will give some back."""
        try:
            self.engine.admit(entry.job)
        except BusyError as error:
            if self._active:
                self._waiting.append(entry)
                return False
            self._refuse(entry, error)
            return True
        except Exception:
            log.exception("value engine: cannot admit a job")
            self.engine.release(entry.job)
            self._refuse(entry, ModelError("internal error of the value engine"))
            return True
        entry.job.queue_seconds = time.perf_counter() - entry.submitted
        self._active.append(entry)
        self._finish()
        return True

    def _advance(self) -> None:
        """One pass. If it fails for all jobs together, each has its own try."""
        try:
            self._forward(self._active)
        except Exception as error:
            log.warning("value engine: a pass of %d jobs failed: %r", len(self._active), error)
            for entry in list(self._active):
                try:
                    self._forward([entry])
                except Exception as own_error:
                    log.exception("value engine: forward pass failed")
                    self._fail([entry], ModelError(f"the forward pass failed: {own_error}"))
        self._finish()

    def _forward(self, entries: list[_Entry]) -> None:
        begin = time.perf_counter()
        queries = self.engine.advance([entry.job for entry in entries])
        seconds = time.perf_counter() - begin
        self.on_pass(queries, len(entries), seconds)
        for entry in entries:
            entry.job.prefill_seconds += entry.job.compute_seconds
            entry.job.compute_seconds = seconds

    def _finish(self) -> None:
        """Answer the active jobs that are done."""
        for entry in [e for e in self._active if self.engine.is_done(e.job)]:
            try:
                result = self.engine.result(entry.job)
            except RequestError as error:
                self._fail([entry], error)
                continue
            self._drop(entry)
            with suppress(InvalidStateError):  # the caller has left
                entry.future.set_result(result)

    def _refuse(self, entry: _Entry, error: RequestError) -> None:
        """Fail a job that was not admitted."""
        self._left += 1
        _fail_future(entry, error)

    def _fail(self, entries: list[_Entry], error: RequestError) -> None:
        for entry in entries:
            self._drop(entry)
            _fail_future(entry, error)

    def _drop(self, entry: _Entry) -> None:
        self._active.remove(entry)
        self._left += 1
        self.engine.release(entry.job)


def _fail_future(entry: _Entry, error: RequestError) -> None:
    with suppress(InvalidStateError):  # the caller has left
        entry.future.set_exception(error)
