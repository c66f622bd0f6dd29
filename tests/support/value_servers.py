"""Value servers for tests, as processes and in a thread, and what their clients send."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from lenvm_vllm.commands.processes import free_port
from lenvm_vllm.commands.servers import LENVM
from tests.support import tiny
from tests.support.blocked import SECONDS, wait_until
from tests.support.collector import Collector
from value_server.contract import wire
from value_server.engine.job import Job, Row

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Server:
    """A process that many tests share. tokens: of its clients. spans: where it sends its traces."""

    url: str
    log: Path
    metrics_port: int
    spans: Collector
    tokens: tuple[str, str] = ("hunter2", "second")


@contextlib.contextmanager
def served(
    checkpoint: str | Path,
    *flags: str,
    log: Path | None = None,
    uds: Path | None = None,
    scheme: str = "http",
    verify: Any = True,
    program: Sequence[str] = LENVM,
    **environment: str,
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """URL and process of a small server, interrupted at the end unless it has ended before.

    program: in the place of `lenvm`.
    """
    port = free_port()
    url = f"{scheme}://127.0.0.1:{port}"
    command = [*program, "serve", str(checkpoint), "--dtype", "float32", "--slots", "400", *flags]
    command += ["--threads", "1", *(["--uds", str(uds)] if uds else ["--port", str(port)])]
    with contextlib.ExitStack() as stack:
        log = log or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
        out = stack.enter_context(log.open("w"))
        environment = os.environ | environment
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=out, text=True)
        try:
            transport = httpx.HTTPTransport(uds=str(uds) if uds else None, verify=verify)
            with as_client(url, transport=transport) as client:
                _wait_ready(client, process, log)
            yield url, process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(SECONDS)


def _wait_ready(client: httpx.Client, process: subprocess.Popen[str], log: Path) -> None:
    limit = time.monotonic() + 300
    while time.monotonic() < limit:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(httpx.TransportError):
            if client.get("/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError("server did not come up")


@contextlib.contextmanager
def in_thread(server: uvicorn.Server, port: int = 0) -> Iterator[tuple[str, threading.Thread]]:
    """URL and thread of a server of this process."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", thread
        finally:
            server.should_exit = True
            thread.join(SECONDS)


@contextlib.contextmanager
def asking(
    url: str, path: str, content: bytes, method: str = "POST", **headers: str
) -> Iterator[None]:
    """A request whose client leaves at the end of the block, without an answer."""
    place = httpx.URL(url)
    with contextlib.closing(HTTPConnection(place.host, place.port, timeout=SECONDS)) as connection:
        connection.request(method, path, content, headers)
        yield


def as_client(url: str, token: str = "", **options: Any) -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False, **options)


def step_body(*rows: tuple[str, int, list[int], list[int]], **options: Any) -> bytes:
    """rows: (session, start, tokens, candidates)."""
    return wire.encode(
        wire.StepRequest(
            sessions=[r[0] for r in rows],
            starts=[r[1] for r in rows],
            token_counts=[len(r[2]) for r in rows],
            tokens=wire.pack_ids([t for r in rows for t in r[2]]),
            candidate_counts=[len(r[3]) for r in rows],
            candidates=wire.pack_ids([c for r in rows for c in r[3]]),
            **options,
        )
    )


def step(
    client: httpx.Client, *rows: tuple[str, int, list[int], list[int]], **options: Any
) -> wire.StepReply:
    body = step_body(*rows, **options)
    reply = client.post(wire.STEP_PATH, content=body).raise_for_status()
    return wire.decode_reply(reply.content, wire.decode_request(body))


def naive(ids: list[int], **model: int) -> torch.Tensor:
    """(T,) logits of a text by the tiny model, plainly."""
    with torch.inference_mode():
        return tiny.tiny_model(**model)(torch.tensor([ids]))[0]  # type: ignore[arg-type]


def job(name: str, tokens: list[int], start: int = 0) -> Job:
    """A step of one session with the candidates 1 and 2."""
    return Job([Row(name, start, tokens, [1, 2])])


def expected(text: list[int]) -> list[torch.Tensor]:
    """Their logits behind the text."""
    return [naive([*text, c], max_position=1024)[-1] for c in (1, 2)]
