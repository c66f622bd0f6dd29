"""How long something takes, and waiting for something."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import torch


def times_ms(run: Callable[[], object], count: int, warm: int = 1) -> list[float]:
    """Of `count` runs, after `warm` more; with what they leave a GPU to do."""
    times = []
    for _ in range(warm + count):
        begin = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return times[warm:]


def best_ms(run: Callable[[], object], count: int) -> float:
    """The shortest of `count` runs: the machine's other work only adds."""
    return min(times_ms(run, count))


def wait_until(true: Callable[[], bool], patience_s: float = 180.0) -> float:
    """Seconds until it was. Raises TimeoutError."""
    begin = time.monotonic()
    while not true():
        if time.monotonic() > begin + patience_s:
            raise TimeoutError(f"nothing came in {patience_s} s")
        time.sleep(0.05)
    return time.monotonic() - begin


class Watch:
    """Seconds spent in each part, those of a part inside another one not counted twice."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """now: a clock in seconds."""
        self.seconds: dict[str, float] = {}
        self._now = now
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._turn()
        self._running.append(name)
        yield
        self._turn()
        self._running.pop()

    @contextmanager
    def over(self, parts: Mapping[str, Sequence[str]]) -> Iterator[None]:
        """Count the parts, each of some functions, by their dotted names."""
        with ExitStack() as patches:
            for part, paths in parts.items():
                for path in paths:
                    patches.enter_context(patch(path, self._watched(part, resolve_name(path))))
            yield

    def _turn(self) -> None:
        now = self._now()
        if self._running:
            part = self._running[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now

    def _watched(self, part: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return run(*args, **kwargs)

        return watched
