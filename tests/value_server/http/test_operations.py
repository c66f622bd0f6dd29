"""How a value server ends, and how it changes its checkpoint: nobody's session is dropped."""

import logging
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
import torch
import uvicorn

from tests.support.blocked import SECONDS, BlockedEngine, wait_until
from tests.support.tiny import GAMMA, tiny_checkpoint, tiny_model
from tests.value_server.http.test_security import served
from tests.value_server.http.test_server import naive, step, step_body
from value_server.contract import wire
from value_server.contract.values import logit_in_gamma
from value_server.engine.engine import Engine
from value_server.http.app import create_app
from value_server.http.text import Texts
from value_server.serve import ValueServer

OTHER_GAMMA = 0.999


@contextmanager
def in_thread(
    engine: Engine, load: Callable[[], Engine], drain_s: float = 0.0
) -> Iterator[tuple[ValueServer, httpx.Client, threading.Thread]]:
    app = create_app(engine, Texts(None))
    config = uvicorn.Config(app, log_level="warning")
    server = ValueServer(config, app.state.served, drain_s, load)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until(lambda: server.started)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, timeout=SECONDS, trust_env=False) as client:
                yield server, client, thread
        finally:
            server.should_exit = True
            thread.join(SECONDS)


def other_engine(gamma: float = OTHER_GAMMA, **options: int) -> Engine:
    """Another checkpoint for the same tokenizer, trained with another gamma."""
    model = tiny_model(seed=1, **options)
    model.lenvm = msgspec.structs.replace(model.lenvm, gamma=gamma)
    return Engine(model, slots=400)


def scores(seed: int, text: list[int], candidates: list[int]) -> torch.Tensor:
    model = tiny_model(seed)
    with torch.inference_mode():
        return torch.stack([model(torch.tensor([[*text, c]]))[0, -1] for c in candidates])


def test_what_runs_is_finished_and_what_comes_is_refused() -> None:
    engine = BlockedEngine()
    with (
        in_thread(engine, lambda: engine) as (server, client, thread),
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


def test_sessions_end_where_they_began_and_new_ones_begin_on_the_new_checkpoint() -> None:
    first = Engine(tiny_model(), slots=400)
    with in_thread(first, other_engine) as (server, client, _):
        step(client, ("old", 0, [1, 2], [3]))
        server.reload()
        wait_until(lambda: server._served.engine is not first)
        assert client.get(wire.MODEL_PATH).json()["gamma"] == GAMMA
        reply = step(client, ("old", 2, [3], [4, 5]), ("new", 0, [6, 7], [8]), ("no", 5, [1], [2]))
        assert reply.unknown == [2]
        new = logit_in_gamma(scores(1, [6, 7], [8]).double(), OTHER_GAMMA, GAMMA)
        expected = torch.cat([scores(0, [1, 2, 3], [4, 5]), new.float()])
        got = wire.unpack_logits(reply.logits)
        np.testing.assert_allclose(got[:3], expected, atol=1e-3)
        assert np.isnan(got[3])

        server.reload()  # not yet
        assert step(client, ("old", 3, [4], [5])).unknown == []
        client.post(wire.STEP_PATH, content=step_body(closed=["old"])).raise_for_status()
        wait_until(lambda: server._served._before is None)
        assert step(client, ("new", 2, [8], [9])).unknown == []
        lengths = client.post(wire.PREDICT_PATH, json={"token_ids": [6, 7, 8]}).json()
        z = scores(1, [6, 7], [8]).double()
        assert lengths["predicted_tokens"] == pytest.approx(
            (torch.nn.functional.softplus(z) / -np.log(OTHER_GAMMA)).item(), rel=1e-3
        )


def test_a_text_sent_again_leaves_the_old_checkpoint() -> None:
    first = Engine(tiny_model(), slots=400)
    with in_thread(first, other_engine) as (server, client, _):
        step(client, ("a", 0, [1, 2], [3]))
        server.reload()
        wait_until(lambda: server._served.engine is not first)
        step(client, ("a", 0, [1, 2, 3], [4]))
        wait_until(lambda: server._served._before is None)
        assert step(client, ("a", 3, [4], [5])).unknown == []


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: other_engine(max_position=100), "max_position: 100 in the new"),
        (lambda: 1 / 0, "division by zero"),
    ],
)
def test_a_checkpoint_that_cannot_follow_changes_nothing(
    load: Callable[[], Engine], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = Engine(tiny_model(), slots=400)
    with in_thread(first, load) as (server, client, _), caplog.at_level(logging.ERROR):
        server.reload()
        wait_until(lambda: message in caplog.text)
        assert step(client, ("a", 0, [1], [2])).unknown == []
        assert server._served.engine is first


@pytest.mark.e2e
def test_signals_of_a_real_server(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    with served(folder, "--dtype", "float32", "--drain-s", "600") as (url, process):
        client = httpx.Client(base_url=url, timeout=60, trust_env=False)
        step(client, ("old", 0, [1, 2], [3]))
        shutil.rmtree(folder)
        tiny_checkpoint(folder, seed=1)
        process.send_signal(signal.SIGHUP)
        expected = scores(1, [1, 2], [3])
        names = iter(f"s{i}" for i in range(10_000))

        def switched() -> bool:
            z = wire.unpack_logits(step(client, (next(names), 0, [1, 2], [3])).logits)
            return bool(np.allclose(z, expected, atol=1e-3))

        wait_until(switched)
        old = wire.unpack_logits(step(client, ("old", 2, [3], [4])).logits)
        np.testing.assert_allclose(old, [naive([1, 2, 3, 4])[-1]], atol=1e-3)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/ready").status_code == 503)
        assert client.get("/health").status_code == 200
        process.send_signal(signal.SIGTERM)  # at once
        assert process.wait(SECONDS) == 128 + signal.SIGTERM
