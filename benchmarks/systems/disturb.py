"""What a benchmark does to its servers while they are asked."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from lenvm_vllm.commands.processes import Server


@contextmanager
def paused(server: Server) -> Iterator[None]:
    """No turn for any of its processes."""
    server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)


@contextmanager
def awake(server: Server) -> Iterator[Server]:
    """One that is paused has its turn."""
    server.signal(signal.SIGCONT)
    try:
        yield server
    finally:
        server.signal(signal.SIGSTOP)


@contextmanager
def killed(server: Server) -> Iterator[None]:
    """Gone without a word, and started anew behind the block."""
    server.signal(signal.SIGKILL)
    yield
    server.stop()  # what is left of it
    server.start()


@contextmanager
def meanwhile(turn: Callable[[], None]) -> Iterator[None]:
    """`turn` again and again, as long as the block lasts. Raises what it raises."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            turn()

    with ThreadPoolExecutor(1) as threads:
        work = threads.submit(run)
        try:
            yield
        finally:
            stop.set()
        work.result()
