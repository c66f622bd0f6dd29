"""One server process for all tests that neither end it nor need it otherwise."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lenvm_vllm.commands.processes import free_port
from tests.support.collector import collecting
from tests.support.tiny import tiny_checkpoint
from tests.support.value_servers import Server, as_client, served
from value_server.engine.engine import Engine
from value_server.model.value_model import ValueModel


@pytest.fixture(scope="session", autouse=True)
def device() -> Iterator[None]:
    """Engines work on LENVM_TEST_DEVICE, say "cuda", where that is set; references on the CPU.

    Servers that are processes take a GPU by themselves.
    """
    begin = Engine.__init__

    def on_device(self: Engine, model: ValueModel, **options: Any) -> None:
        begin(self, model.to(os.environ.get("LENVM_TEST_DEVICE", "cpu")), **options)

    with pytest.MonkeyPatch.context() as patch:
        if "LENVM_TEST_DEVICE" in os.environ:
            patch.setattr(Engine, "__init__", on_device)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    tokens = folder / "tokens"
    tokens.write_text("\n".join(Server.tokens))
    port = free_port()
    flags = [
        *("--max-candidates", "20", "--max-body-bytes", "20000", "--client-sessions", "4"),
        *("--token-file", str(tokens), "--metrics-port", str(port), "--log-format", "json"),
    ]
    log = folder / "log"
    with collecting() as spans:
        environment = spans.environment | {"OTEL_BSP_SCHEDULE_DELAY": "50"}
        with served(checkpoint, *flags, log=log, **environment) as (url, process):
            yield Server(url, log, port, spans)
            assert process.poll() is None, "the server died during the tests"
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with as_client(server.url, server.tokens[0]) as client:
        yield client
