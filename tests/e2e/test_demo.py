"""`lenvm demo`, the real thing: what its arms get, and that nothing is left of it."""

import signal
import sys
import time
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
from openai import OpenAI

from lenvm_vllm.api.outcome import ENDS
from lenvm_vllm.commands.demo import NAME
from lenvm_vllm.commands.demo.questions import (
    BOTH,
    DEFAULT,
    EXACT,
    UNGUIDED,
    Length,
    Question,
    ask_all,
)
from lenvm_vllm.commands.processes import free_port
from tests.e2e.pairs import Pair
from tests.lenvm_vllm.commands.test_ended import gone, in_background, line
from tests.support.servers import WAITS
from value_server.contract.listen import check_port

pytestmark = pytest.mark.e2e
SECONDS = 300
ENGINE = "VLLM::EngineCore"  # what vLLM calls the process that it starts when it knows its model


def demo(port: int, value_port: int) -> list[str]:
    ports = ("--port", str(port), "--value-port", str(value_port))
    return [sys.executable, "-m", "lenvm_vllm.commands.cli", "demo", "--serve", *ports]


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


def assert_it_serves(url: str) -> None:
    """Guided by values, with the playground."""
    assert httpx.get(f"{url}/lenvm", timeout=60).status_code == 200
    body = {"model": NAME, "prompt": "Hi", "length_target": {"tokens": 9, "tolerance": 0}}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    assert reply["usage"]["completion_tokens"] == 9
    assert reply["choices"][0]["length_result"]["steered_steps"] > 0


@pytest.mark.parametrize(("number", "starting"), [(signal.SIGINT, False), (signal.SIGKILL, True)])
def test_nothing_is_left(
    number: signal.Signals, starting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENVM_SERVER_UDS", str(tmp_path / "elsewhere"))
    for name, value in WAITS.items():
        monkeypatch.setenv(name, value)
    port, value_port = free_port(), free_port()
    with in_background(*demo(port, value_port)) as (process, shell):
        assert line(shell).startswith("starting")
        assert line(shell) == "waiting for the value server"
        if not starting:
            while "Ctrl-C ends both" not in (said := line(shell)):
                assert said.startswith(("waiting for the value server", "waiting for vLLM"))
            assert_it_serves(f"http://127.0.0.1:{port}")
        processes = below(process, ENGINE)
        assert len(processes) > 4
        process.send_signal(number)
        assert shell.stdout is not None
        *lines, code = shell.stdout.read().splitlines()
        assert code == str(128 + number)
        more = [said for said in lines if not said.startswith("waiting for ")]
        assert more == ([] if number != signal.SIGKILL else ["Killed"])  # the shell's own word
        assert gone(processes)
    check_port("127.0.0.1", port)
    check_port("127.0.0.1", value_port)


@pytest.mark.pair("small")
def test_what_the_arms_get(pair: Pair) -> None:
    length = Length(40)
    client = OpenAI(base_url=f"{pair.url}/v1", api_key="none", max_retries=0)
    create = partial(client.chat.completions.create, model=NAME)
    arms = (UNGUIDED, DEFAULT, BOTH, EXACT)
    questions = [Question(arm, "Why is the sky blue?", (length,)) for arm in arms]
    unguided, *guided = ask_all(create, questions)
    with pytest.raises(RuntimeError, match=r"length_target\.tokens: 1 is too short"):
        list(ask_all(create, [Question(DEFAULT, "Hi.", (Length(1),))]))
    assert unguided.end in ("own", "max_tokens")
    assert guided[-1].count == length.number
    for answer in guided:
        assert abs(answer.deviation) <= 10
        assert answer.end in ENDS
        assert answer.seconds
