"""`lenvm demo --serve`, the real thing, ended by signals: nothing of it is left."""

import signal
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from lenvm_vllm.processes import free_port
from tests.test_ended import gone, in_background, line
from value_server.contract.listen import check_port

pytestmark = pytest.mark.e2e
SECONDS = 300
ENGINE = "VLLM::EngineCore"  # what vLLM calls the process that it starts when it knows its model


def demo(port: int, value_port: int) -> list[str]:
    ports = ("--port", str(port), "--value-port", str(value_port))
    return [sys.executable, "-m", "lenvm_vllm.cli", "demo", "--serve", *ports]


def command(process: psutil.Process) -> str:
    """Its command line; empty for one that has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie is one of these too
        return ""


def below(process: psutil.Process, name: str) -> list[psutil.Process]:
    """All processes below, once one of them has this name."""
    limit = time.monotonic() + SECONDS
    while time.monotonic() < limit:
        processes = process.children(recursive=True)
        if any(name in command(child) for child in processes):
            return processes
        time.sleep(0.1)
    raise AssertionError(f"no {name}")


@pytest.mark.parametrize(
    ("number", "starting"), [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, True)]
)
def test_nothing_is_left(
    number: signal.Signals, starting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENVM_SERVER_UDS", str(tmp_path / "elsewhere"))
    port, value_port = free_port(), free_port()
    with in_background(*demo(port, value_port)) as (process, shell):
        assert line(shell).startswith("starting")
        if not starting:
            assert "Ctrl-C ends both" in line(shell)
            assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        processes = below(process, ENGINE)
        assert len(processes) > 4
        process.send_signal(number)
        assert shell.stdout is not None
        *more, code = shell.stdout.read().splitlines()
        assert code == str(128 + number)
        assert more == ([] if number != signal.SIGKILL else ["Killed"])  # the shell's own word
        assert gone(processes)
    check_port("127.0.0.1", port)
    check_port("127.0.0.1", value_port)
