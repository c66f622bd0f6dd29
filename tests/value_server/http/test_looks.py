"""Pictures over a socket, with a model that looks when a test lets it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn

from tests.support.blocked import SECONDS, wait_until
from tests.support.seeing import Seer, ShutSight, digest, file_of
from tests.support.value_servers import as_client, asking, in_thread, step
from value_server.contract import wire
from value_server.engine.engine import Engine
from value_server.http.app import create_app
from value_server.http.models import ServedModel
from value_server.http.text import Texts


@dataclass(frozen=True)
class Served:
    seer: Seer
    text: list[int]
    sight: ShutSight
    model: ServedModel
    url: str
    client: httpx.Client

    def head(self, number: int) -> int:
        return self.client.head(f"{wire.PICTURES_PATH}/{digest(number)}").status_code

    def put(self, number: int) -> int:
        path = f"{wire.PICTURES_PATH}/{digest(number)}"
        return self.client.put(path, content=file_of(number)).status_code

    def putting(self, number: int) -> AbstractContextManager[None]:
        """See `asking`."""
        return asking(self.url, f"{wire.PICTURES_PATH}/{digest(number)}", file_of(number), "PUT")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    seer = Seer.of("llava", tmp_path)
    model = ServedModel.of(Engine(seer.value, slots=512), Texts(None))
    app = create_app({"": model})
    with (
        in_thread(uvicorn.Server(uvicorn.Config(app, log_level="warning"))) as (url, _),
        as_client(url) as client,
    ):
        sight = ShutSight(seer) if (text := seer.text([0])) else None
        assert sight
        try:
            yield Served(seer, text, sight, model, url, client)
        finally:
            sight.open()


def test_steps_go_on_while_the_model_looks(served: Served) -> None:
    pictures = {0: [digest(0)]}
    with ThreadPoolExecutor(1) as pool:
        putting = pool.submit(served.put, 0)
        served.sight.wait_for_look()
        assert served.head(0) == 404
        rows = [("a", 0, served.text, [1, 2]), ("b", 0, [5, 6], [1])]
        reply = step(served.client, *rows, pictures=pictures)
        assert reply.held == [0, 2]
        assert np.isnan(wire.unpack_logits(reply.logits)).tolist() == [True, True, False]
        assert not putting.done()
        served.sight.open()
        assert putting.result(SECONDS) == 204
    assert served.head(0) == 204
    reply = step(served.client, *rows, pictures=pictures)
    expected = [served.seer.z([*served.text, c], [0]) for c in (1, 2)]
    np.testing.assert_allclose(wire.unpack_logits(reply.logits)[:2], expected, atol=1e-4)


def test_clients_who_leave(served: Served) -> None:
    """The look that runs is finished, what waits is dropped."""
    with served.putting(0):
        served.sight.wait_for_look()
        with served.putting(1):
            wait_until(lambda: digest(1) in served.model.intake._coming)
    gone = 'lenvm_errors_total{type="client_gone"} 2.0'
    wait_until(lambda: gone in served.client.get("/metrics").text)
    served.sight.open()
    assert served.put(0) == 204
    assert served.put(2) == 204
    assert [served.head(number) for number in range(3)] == [204, 404, 204]
    assert served.sight.looks == 2
