"""An engine that computes a pass only when a test lets it."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from tests.support import tiny
from value_server.engine.engine import Engine
from value_server.engine.job import Job

SECONDS = 120.0  # longer than anything here takes


def wait_until(true: Callable[[], bool]) -> None:
    """Poll `true`."""
    limit = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.001)


class BlockedEngine(Engine):
    """Every pass waits for `allow`; `waiting` tells that one does, `passes` how many were made.

    Its clock stands still: who is in use stays so, however long a test takes.
    """

    def __init__(self, **options: int) -> None:
        given: dict[str, Any] = {"slots": 4096, "now": lambda: 0.0} | options
        super().__init__(tiny.tiny_model(max_position=1024), **given)
        self.passes = 0
        self._allowed = threading.Semaphore(0)
        self._waiting = threading.Semaphore(0)

    def allow(self, passes: int = 1000) -> None:
        """Let the next `passes` passes go."""
        self._allowed.release(passes)

    def wait_for_pass(self) -> None:
        """Return when a pass begins; each pass is reported once."""
        assert self._waiting.acquire(timeout=SECONDS)

    def advance(self, jobs: Sequence[Job]) -> int:
        self._waiting.release()
        assert self._allowed.acquire(timeout=SECONDS)
        self.passes += 1
        return super().advance(jobs)
