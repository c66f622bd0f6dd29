"""How long something takes, and waiting for something."""

import time
from collections.abc import Callable

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
