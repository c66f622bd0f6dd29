"""The same examples in every run: a property test that fails should fail for everyone, and not
because the machine is busy. And, where asked for, a machine without compilers."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support.bare import hide_compilers

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "hide the compilers from the tests and from the servers that they start"
    parser.addoption("--without-compiler", action="store_true", help=text)


@pytest.fixture(scope="session", autouse=True)
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--without-compiler"):
            hide_compilers(patch, tmp_path_factory.mktemp("bare"))
        yield
