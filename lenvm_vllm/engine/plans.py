"""The plan of each step, or none: whatever goes wrong, the step goes on with the model's own
distribution inside the guard rails, and the log says so once."""

import logging
import time
from collections.abc import Iterable

from torch import Tensor

from lenvm_vllm.engine.guide import Guide
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.steering.candidates import Writes
from lenvm_vllm.telemetry.metrics import Counters
from lenvm_vllm.values.client import CircuitOpen

logger = logging.getLogger("vllm.lenvm")


class Plans:
    def __init__(self, guide: Guide, counters: Counters) -> None:
        self._guide = guide
        self._counters = counters
        self._trouble: str | None = None

    def plan(self, logits: Tensor, states: dict[int, RequestState]) -> Writes | None:
        """As `Guide.plan`, but never raises; its time and its failures are counted."""
        started = time.perf_counter()
        sessions = self._guide.sessions
        try:
            writes = self._guide.plan(logits, states)
        except Exception as error:
            writes = None
            self._counters.add("fallback_steps")
            for state in states.values():
                state.valued = False
            self._report(f"{type(error).__name__}: {error}", traceback=True)
        else:
            if (trouble := sessions.trouble) is None:
                if any(state.valued for state in states.values()):
                    self._report(None)
            elif not isinstance(trouble, CircuitOpen):
                self._report(f"{type(trouble).__name__}: {trouble}")
        self._counters.add("steps")
        self._counters.add("plan_seconds", time.perf_counter() - started)
        return writes

    def tell(self, states: Iterable[RequestState]) -> None:
        """As `Guide.tell`, but never raises."""
        try:
            self._guide.tell(states)
        except Exception as error:
            self._report(f"{type(error).__name__}: {error}", traceback=True)

    def _report(self, trouble: str | None, traceback: bool = False) -> None:
        """Log a change between values and none; later failures of one outage are silent."""
        if trouble is not None and self._trouble is None:
            logger.error(
                "length targets: no values (%s); requests go on without them",
                trouble,
                exc_info=traceback,
            )
        if trouble is None and self._trouble is not None:
            logger.info("length targets: the value server is back, requests are steered again")
        self._trouble = trouble
