"""Nothing that a client sends is answered 500: a short look at it."""

from collections.abc import Iterator

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks.systems.fuzz import check_step, describe, server, step_bodies
from tests.support.value_servers import step

pytestmark = pytest.mark.e2e

quick = settings(suppress_health_check=list(HealthCheck), max_examples=150)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """Of a server that has logged no bug in the end."""
    with server() as serving:
        with httpx.Client(base_url=serving.url, timeout=60, trust_env=False) as client:
            yield client
            assert step(client, ("after", 0, [1], [2])).held == [1]
        assert serving.process.poll() is None
        assert "Traceback" not in serving.log.read_text()


@quick
@given(step_bodies)
def test_step(client: httpx.Client, body: bytes) -> None:
    check_step(client, body)


def test_everything_described(client: httpx.Client) -> None:
    run = describe(str(client.base_url).rstrip("/"), examples=10, number=0)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
