"""Nothing that a client sends is answered 500: a short look, benchmarks/fuzz.py takes longer."""

from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import BaseSchema

from benchmarks.fuzz import check_step, server, step_bodies
from tests.test_server import step

quick = settings(suppress_health_check=list(HealthCheck), max_examples=150)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """Of a server that has logged no bug in the end."""
    with server() as (url, process, log):
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield client
            assert step(client, ("after", 0, [1], [2])).unknown == []
        assert process.is_running()
        assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def description(client: httpx.Client) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")


@quick
@given(step_bodies)
def test_step(client: httpx.Client, body: bytes) -> None:
    check_step(client, body)


schema = schemathesis.pytest.from_fixture("description")


@schema.parametrize()
@settings(quick, max_examples=30)
def test_everything_described(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=[not_a_server_error])
