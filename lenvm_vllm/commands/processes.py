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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import httpx

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 15
VALUE_SERVER = (sys.executable, "-m", "lenvm_vllm.commands.cli", "serve")
VLLM_SERVE = (sys.executable, "-m", "lenvm_vllm.vllm_cli", "serve")
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
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


@contextlib.contextmanager
def running(
    command: list[str],
    ready_url: str,
    log: Path,
    env: dict[str, str] | None = None,
    uds: Path | None = None,
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A server, up once `ready_url` answers 200. Raises RuntimeError with the end of its log.

    uds: the Unix socket that it listens on, if it does. waiting: called some times a second until
    it is up.
    """
    with log.open("ab") as out:
        child = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | (env or {}),
            start_new_session=True,
        )
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "guard", str(child.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(ready_url, uds):
            if child.poll() is not None or time.monotonic() > deadline:
                end = log.read_text(errors="replace")[-4000:]
                raise RuntimeError(f"{ready_url} did not come up; {log}:\n{end}")
            waiting()
            time.sleep(0.3)
        yield child
    finally:
        _signal(child, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_TIMEOUT_S)
        _signal(child, signal.SIGKILL)  # whatever the group still holds
        child.wait()
        guard.kill()
        guard.communicate()


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _answers(url: str, uds: Path | None) -> bool:
    transport = httpx.HTTPTransport(uds=str(uds) if uds else None)
    try:
        with httpx.Client(transport=transport, timeout=2) as client:
            return client.get(url).status_code == 200
    except httpx.HTTPError:
        return False
