"""The plan of each step, or none: whatever goes wrong with the values, the step goes on with the
model's own distribution inside the guard rails, and the log says so once."""

import logging
import time

from torch import Tensor

from lenvm_vllm.engine.guide import Guide
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.steering.candidates import Writes
from lenvm_vllm.telemetry.metrics import Counters
from lenvm_vllm.values.client import CircuitOpen, ValueServerError

logger = logging.getLogger("vllm.lenvm")


class Plans:
    def __init__(self, guide: Guide, counters: Counters) -> None:
        self._guide = guide
        self._counters = counters
        self._trouble: str | None = None

    def plan(self, logits: Tensor, states: dict[int, RequestState]) -> Writes | None:
        """As `Guide.plan`, but never raises; its time and its failures are counted.

        The one place that decides to go on without values.
        """
        started = time.perf_counter()
        try:
            writes = self._guide.plan(logits, states)
        except Exception as error:
            writes = None
            self._counters.add("fallback_steps")
            for state in states.values():
                state.valued = False
            if not isinstance(error, CircuitOpen):
                ours = isinstance(error, ValueServerError)
                self._report(f"{type(error).__name__}: {error}", traceback=not ours)
        if writes is not None:  # None: nothing was asked, so nothing is known
            self._report(None)
        self._counters.add("steps")
        self._counters.add("plan_seconds", time.perf_counter() - started)
        return writes

    def _report(self, trouble: str | None, traceback: bool = False) -> None:
        """Log a change between steered and not; later failures of one outage are silent."""
        if trouble is not None and self._trouble is None:
            logger.error(
                "length targets: no values (%s); requests go on with guard rails only",
                trouble,
                exc_info=traceback,
            )
        if trouble is None and self._trouble is not None:
            logger.info("length targets: the value server is back, requests are steered again")
        self._trouble = trouble
