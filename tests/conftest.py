"""The same examples in every run: a property test that fails should fail for everyone, and not
because the machine is busy. The order of the tests, and which of them share a process. And, where
asked for, a machine without compilers."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from lenvm_vllm.commands import processes
from tests.support.bare import hide_compilers

# Of this process and those that it starts. The models are tiny, and two tests run at a time: one
# thread each, on whichever core is free, where vLLM would put all of them on the same one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

# A port is free until its server listens there, seconds later: each process takes others.
worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
processes._PORTS = iter([port for port in processes._PORTS if port % workers == worker])

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


VLLM = "tests/e2e"


def group_of(item: pytest.Item) -> str:
    """Tests of a group run in one process: those of one file, but all that share servers."""
    return VLLM if item.get_closest_marker("pair") else item.nodeid.split("::")[0]


def order_of(item: pytest.Item) -> tuple[bool, bool, str, str]:
    """Those that take minutes first, those that share servers before all and side by side."""
    group, pair = group_of(item), item.get_closest_marker("pair")
    short = not any(item.get_closest_marker(name) for name in ("e2e", "slow"))
    return not group.startswith(VLLM), short, group, pair.args[0] if pair else ""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=order_of)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))


@pytest.fixture(scope="session", autouse=True)
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--without-compiler"):
            hide_compilers(patch, tmp_path_factory.mktemp("bare"))
        yield
