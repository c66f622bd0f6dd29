"""How a value server ends, and comes back: nobody's request is dropped, nobody's value misread."""

import contextlib
import math
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import pytest
import torch
import uvicorn

from lenvm_vllm.commands.processes import free_port
from lenvm_vllm.values.client import CircuitOpen, Mismatch, ValueClient
from lenvm_vllm.values.replicas import Replicas
from tests.support.blocked import SECONDS, BlockedEngine, wait_until
from tests.support.tiny import tiny_model
from tests.support.value_servers import as_client, in_thread, naive, served, step, step_body
from value_server.contract import wire
from value_server.contract.values import length_from_logit
from value_server.engine.engine import Engine
from value_server.http.app import create_app
from value_server.http.models import ServedModel
from value_server.http.text import Texts
from value_server.serve import BROKEN, ValueServer


def test_what_runs_is_finished_and_what_comes_is_refused() -> None:
    engine = BlockedEngine()
    app = create_app({"": ServedModel.of(engine, Texts(None))})
    server = ValueServer(uvicorn.Config(app, log_level="warning"), app.state.models, 0)
    with (
        in_thread(server) as (url, thread),
        as_client(url) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        running = pool.submit(client.post, wire.STEP_PATH, content=step_body(("a", 0, [1], [2])))
        engine.wait_for_pass()
        server.handle_exit(signal.SIGTERM, None)
        for reply in (
            client.post(wire.STEP_PATH, content=step_body(("b", 0, [1], [2]))),
            client.post(wire.PREDICT_PATH, json={"token_ids": [1]}),
            client.get(wire.MODEL_PATH),  # else a plugin would think that it is back
        ):
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        assert thread.is_alive()
        engine.allow()
        assert running.result(SECONDS).status_code == 200
        thread.join(SECONDS)
        assert not thread.is_alive()


@pytest.mark.e2e
def test_signals_of_a_real_server_on_a_unix_socket(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with served(checkpoint, "--drain-s", "600", uds=path) as (_, process):
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://lenvm", timeout=60) as client:
            assert step(client, ("a", 0, [1], [2])).held == [1]
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get("/ready").status_code == 503)
            assert client.get("/health").status_code == 200
            process.send_signal(signal.SIGTERM)  # at once
            assert process.wait(SECONDS) == 128 + signal.SIGTERM


@pytest.mark.e2e
def test_a_server_whose_model_fails_for_good_ends(checkpoint: Path, tmp_path: Path) -> None:
    """Not ready first, then an exit code that tells a supervisor to start another one."""
    fails = tmp_path / "fails"
    program = (sys.executable, "-m", "tests.support.failing_server")
    log = tmp_path / "log"
    with (
        served(checkpoint, "--drain-s", "15", log=log, program=program, FAILS=str(fails)) as (
            url,
            process,
        ),
        as_client(url) as client,
    ):
        assert step(client, ("a", 0, [1], [2])).held == [1]
        fails.touch()
        assert client.post(wire.STEP_PATH, content=step_body(("a", 1, [5], [2]))).status_code == 503
        for path, kind in (("/ready", "not_ready"), ("/health", "broken")):
            reply = client.get(path)
            assert (reply.status_code, reply.json()["error"]["type"]) == (503, kind)
        assert process.wait(SECONDS) == BROKEN
    assert "ending with exit code 70" in log.read_text()


def is_back(replicas: Replicas) -> bool:
    with contextlib.suppress(CircuitOpen, Mismatch):  # not yet
        replicas.model(lambda: None)
    return bool(replicas.live)


def test_a_plugin_reads_another_checkpoint_rightly() -> None:
    """The server is replaced between two steps, so that no call fails: the client just connects
    again. The other checkpoint is of another gamma, by which its values would be lengths ten
    times as long."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    replicas = Replicas({url: ValueClient(url, timeout_s=SECONDS, backoff_s=(0.0, 0.0))})

    def server(seed: int, gamma: float) -> uvicorn.Server:
        model = tiny_model(seed)
        model.lenvm = msgspec.structs.replace(model.lenvm, gamma=gamma)
        app = create_app({"": ServedModel.of(Engine(model, slots=400), Texts(None))})
        return uvicorn.Server(uvicorn.Config(app, log_level="warning"))

    def ask(start: int, tokens: list[int]) -> tuple[float, int]:
        """The length to expect, and how much of the text the server has."""
        end = time.perf_counter() + SECONDS
        gamma = replicas.model(lambda: None, end).gamma
        (call,) = replicas.send(["a"], [1], lambda *_: message(start, tokens), SECONDS, SECONDS)
        assert call.is_there(end)
        if (reply := replicas.read(call)) is None:
            return math.nan, 0
        z = torch.from_numpy(wire.unpack_logits(reply.logits)).double()
        return length_from_logit(z, gamma).item(), reply.held[0]

    def message(start: int, tokens: list[int]) -> wire.StepRequest:
        return wire.decode_request(step_body(("a", start, tokens, [4])))

    def expected(seed: int, gamma: float, text: list[int]) -> float:
        return length_from_logit(naive(text, seed=seed)[-1].double(), gamma).item()

    with in_thread(server(0, 0.99), port):
        assert ask(0, [1, 2]) == (pytest.approx(expected(0, 0.99, [1, 2, 4]), rel=1e-3), 2)
    with in_thread(server(0, 0.99), port):  # the same anew: no step goes without an answer
        assert ask(2, [4])[1] == 0  # so the whole text is sent
        assert ask(0, [1, 2, 4]) == (pytest.approx(expected(0, 0.99, [1, 2, 4, 4]), rel=1e-3), 3)
    with in_thread(server(1, 0.999), port):
        assert math.isnan(ask(3, [4])[0])  # of another model than it told of: inside the rails
        wait_until(lambda: is_back(replicas))
        assert ask(3, [4])[1] == 0
        length, held = ask(0, [1, 2, 4])
    assert held == 3
    assert length == pytest.approx(expected(1, 0.999, [1, 2, 4, 4]), rel=1e-3)
