"""One shared pair of servers at a time, up for as long as the next test names it, too."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.e2e.pairs import PAIRS, Pair


def name_of(item: pytest.Item) -> str | None:
    """The pair that a test names."""
    mark = item.get_closest_marker("pair")
    return mark.args[0] if mark else None


class Running:
    """The pair that is up, if one is."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._name: str | None = None
        self._pair: Pair | None = None

    def get(self, name: str, folders: pytest.TempPathFactory) -> Pair:
        """Starts it where another one runs or where an earlier test has harmed it."""
        if self._pair is None or self._name != name or not self._pair.is_well():
            self.end()
            self._pair, self._name = PAIRS[name](self._stack, folders.mktemp(name)), name
        return self._pair

    def end(self) -> None:
        self._pair = None
        self._stack.close()


RUNNING = Running()


@pytest.fixture
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """Whatever a test does, it is answered, and never by a 500."""
    name = name_of(request.node)
    assert name is not None
    pair = RUNNING.get(name, tmp_path_factory)
    pair.said()
    yield pair
    said = pair.said()
    assert "500 Internal" not in said, said[-3000:]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and name_of(nextitem) != name_of(item):
        RUNNING.end()


def pytest_sessionfinish() -> None:
    RUNNING.end()
