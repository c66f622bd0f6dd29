"""One engine, two value servers, and one of them is killed while it is in use."""

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from lenvm_vllm.commands.processes import free_port
from tests.support.servers import BARE_FLAG, WAITS, value_serve, vllm_serve
from tests.support.tiny import tiny_checkpoint
from tests.support.tiny_llm import tiny_llm

pytestmark = pytest.mark.e2e

EXACT = {"tokens": 120, "tolerance": 0.0, "endings": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    tiny_checkpoint(folder / "value")
    tiny_llm(folder / "model")
    return folder


@pytest.fixture(scope="module")
def ports() -> tuple[int, int]:
    return free_port(), free_port()


@pytest.fixture(scope="module")
def engine(folder: Path, ports: tuple[int, int]) -> Iterator[httpx.Client]:
    urls = ",".join(url_of(port) for port in ports)
    env = WAITS | {"LENVM_URL": urls, "LENVM_FORECAST": "true"}
    with (
        vllm_serve(folder / "model", folder / "vllm.log", *BARE_FLAG, env=env) as url,
        httpx.Client(base_url=url, timeout=120, trust_env=False) as client,
    ):
        yield client


def url_of(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def figure(base: str, name: str) -> float:
    text = httpx.get(f"{base}/metrics", timeout=60, trust_env=False).text
    return sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))


def test_a_killed_replica_loses_no_request(
    engine: httpx.Client, folder: Path, ports: tuple[int, int]
) -> None:
    base = str(engine.base_url).rstrip("/")

    def complete(number: int) -> httpx.Response:
        body: dict[str, Any] = {"model": "tiny", "prompt": f"{number}: ", "max_tokens": 200}
        return engine.post("/v1/completions", json=body | {"length_target": EXACT})

    def check(replies: list[httpx.Response]) -> None:
        for reply in replies:
            assert reply.status_code == 200, reply.text
            assert reply.json()["usage"]["completion_tokens"] == 120
            assert reply.headers["lenvm-predicted-tokens"] == "120"

    with ExitStack() as stack, ThreadPoolExecutor(16) as pool:
        pids = [
            stack.enter_context(
                value_serve(folder / "value", folder / "model", folder / f"{port}.log", port)
            )
            for port in ports
        ]
        running = [pool.submit(complete, number) for number in range(32)]
        while min(figure(url_of(port), "lenvm_step_seconds_count") for port in ports) < 20:
            assert not all(one.done() for one in running)
        log = folder / "vllm.log"
        read = len(log.read_text())  # a server that starts may be told of as well
        sent = figure(url_of(ports[1]), "lenvm_prefix_tokens_total")
        moved = figure(url_of(ports[0]), "lenvm_sessions")
        os.kill(pids[0], signal.SIGKILL)
        check([one.result() for one in running])
        assert figure(base, "lenvm_fallback_steps_total") == 0
        # Texts that the other one was sent from their start: those that moved, and new ones.
        texts = figure(url_of(ports[1]), "lenvm_prefix_tokens_total") - sent
        assert texts < (32 + moved) * 125

        with value_serve(folder / "value", folder / "model", folder / "again.log", ports[0]):
            while f"{url_of(ports[0])} is back" not in log.read_text()[read:]:
                check([complete(1)])
            check(list(pool.map(complete, range(16))))
            assert figure(url_of(ports[0]), "lenvm_step_seconds_count") > 0
    said = log.read_text()[read:]
    assert "no values (" not in said
    assert f"value server {url_of(ports[1])}" not in said
