"""How long a step may wait for values: a share of what vLLM's own step takes."""

import time
from collections.abc import Callable

_WEIGHT = 0.2  # of a new step in the running mean
# Times the mean, as which a longer step counts: a pause between two requests is no step.
_LONGEST = 2.0
_FIRST_S = 0.2  # that the first one counts at most


class Pace:
    """share, floor_s, most_s: settings `wait_share`, `wait_floor_s`, `timeout_s`."""

    def __init__(
        self,
        share: float,
        floor_s: float,
        most_s: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._share, self._most = share, most_s
        self.floor_s = min(floor_s, most_s)
        self._clock = clock
        self._waited: float | None = None  # when the last wait was over
        self.step_s = 0.0  # running mean of vLLM's own step

    @property
    def wait_s(self) -> float:
        """Seconds that a step may wait at most; an answer that usually takes less is waited for
        less long, but `floor_s` at least."""
        return min(self._most, max(self.floor_s, self._share * self.step_s))

    def asks(self) -> None:
        """A step asks for values: since the last wait vLLM did its own part."""
        if self._waited is None:
            return
        took = self._clock() - self._waited
        known = self.step_s or min(took, _FIRST_S)
        self.step_s = known + _WEIGHT * (min(took, _LONGEST * known) - known)
        self._waited = None

    def goes_on(self) -> None:
        """The wait is over."""
        self._waited = self._clock()
