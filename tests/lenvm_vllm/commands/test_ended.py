"""Servers go with the command that started them, however it ends; by a real shell, with children.

What a shell starts in the background does not get SIGINT by default: both kinds are here.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
SECONDS = 60

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(autouse=True)
def _hang_up_is_not_ignored() -> Iterator[None]:
    """Whoever runs these tests may have been started by nohup, which children inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@contextmanager
def in_background(*command: str) -> Iterator[tuple[psutil.Process, "subprocess.Popen[str]"]]:
    """A command that a shell has put there, and the shell, whose last line is the exit code."""
    shell = subprocess.Popen(
        ["sh", "-c", '"$@" & echo $!; wait $!; echo $?', "sh", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield psutil.Process(int(line(shell))), shell
    finally:
        kill_all(psutil.Process(shell.pid))
        shell.communicate()


def line(shell: "subprocess.Popen[str]") -> str:
    assert shell.stdout is not None
    return shell.stdout.readline().strip()


def kill_all(process: psutil.Process) -> None:
    for child in [*process.children(recursive=True), process]:
        child.kill()


def servers(process: psutil.Process, count: int) -> list[psutil.Process]:
    """All below `process`, as soon as they are so many."""
    while len(below := process.children(recursive=True)) < count:
        assert process.is_running()
    return below


def gone(processes: list[psutil.Process]) -> bool:
    """Within the time that a server has to end, and some more; a zombie is gone."""
    _, alive = psutil.wait_procs(processes, timeout=SECONDS)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("starting", [True, False])
def test_both_servers_end_with_a_signal(number: signal.Signals, starting: bool) -> None:
    delay = "1000" if starting else "0"
    with in_background(sys.executable, "-m", "tests.support.ended", delay) as (process, shell):
        assert line(shell) == "starting"
        assert starting or line(shell) == "both"
        below = servers(process, 3 if starting else 6)
        process.send_signal(number)
        assert line(shell) == str(128 + number)
        assert gone(below)


def test_both_servers_end_with_a_process_that_was_killed() -> None:
    with in_background(sys.executable, "-m", "tests.support.ended", "0") as (process, shell):
        assert [line(shell), line(shell)] == ["starting", "both"]
        below = servers(process, 6)
        process.kill()
        assert gone(below)


def test_nohup_is_respected() -> None:
    with in_background("nohup", sys.executable, "-m", "tests.support.ended", "0") as (
        process,
        shell,
    ):
        while line(shell) != "both":
            assert process.is_running()
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        while (last := line(shell)) and not last.isdigit():
            pass
        assert last == str(128 + signal.SIGTERM)
