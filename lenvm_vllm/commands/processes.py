"""Servers as child processes, each in a process group of its own and gone with its block.

They are gone with this process, too, however it ends: a shell beside each server ends its group
once the pipe from here is closed.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Self

import httpx

START_TIMEOUT_S = 900
STOP_TIMEOUT_S = 15
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
STARTED: list["Server"] = []  # by this process, each once; benchmarks tell them
# $1: the group. A group that has ended is left alone, as its number may be another's.
_GUARD = f"""
read -r _
kill -TERM "-$1"
for _ in $(seq {STOP_TIMEOUT_S}); do sleep 1; kill -0 "-$1" || exit; done
kill -KILL "-$1"
"""


# Below those that systems give to outgoing connections, which would take one before its server.
_PORTS = iter(random.SystemRandom().sample(range(20_000, 30_000), 10_000))


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now, another with each call."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port from 20000 to 29999")


@contextlib.contextmanager
def left_by_signals() -> Iterator[None]:
    """SIGTERM, SIGHUP and SIGINT leave the block, and the process with the code 128 + number.

    So does a SIGINT that the shell switched off for a process in the background; a SIGHUP that
    `nohup` switched off stays so. A second one leaves what cleans up: the guards do it then.
    """
    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if (number, handler) != (signal.SIGHUP, signal.SIG_IGN):
            signal.signal(number, _leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


@dataclass
class Server:
    """A command that listens at `url`, up within its block; there it can be stopped and started
    again at the same place.

    ready: the path that answers 200 once it is up. uds: the Unix socket that it listens on, if it
    does. waiting: called some times a second until it is up.
    """

    command: Sequence[str]
    url: str
    ready: str
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    uds: Path | None = None
    waiting: Callable[[], None] = lambda: None
    up: bool = field(default=False, init=False)
    process: subprocess.Popen[bytes] = field(init=False)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns once it is up. Raises RuntimeError with the end of its log."""
        if not any(server is self for server in STARTED):
            STARTED.append(self)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | self.env,
                start_new_session=True,
            )
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", str(self.process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._wait_until_up()
        except BaseException:  # a signal's, too
            self.stop()
            raise

    def stop(self) -> None:
        """By SIGTERM; what its group still holds after STOP_TIMEOUT_S is killed."""
        self.up = False
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT_S)
        self.signal(signal.SIGKILL)
        self.process.wait()
        self._guard.kill()
        self._guard.communicate()

    def signal(self, number: signal.Signals) -> None:
        """To its whole group; nothing happens where that has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                end = self.log.read_text(errors="replace")[-4000:]
                raise RuntimeError(f"{self.url}{self.ready} did not come up; {self.log}:\n{end}")
            self.waiting()
            time.sleep(0.3)
        self.up = True

    def _answers(self) -> bool:
        transport = httpx.HTTPTransport(uds=str(self.uds) if self.uds else None)
        try:
            with httpx.Client(transport=transport, timeout=2) as client:
                return client.get(f"{self.url}{self.ready}").status_code == 200
        except httpx.HTTPError:
            return False
