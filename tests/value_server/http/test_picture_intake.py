"""Pictures that come at the same time, with an engine that looks when a test lets it."""

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from value_server.engine.errors import BusyError, RequestError
from value_server.engine.pictures import MOST_FAILURES, PictureStore
from value_server.http import pictures
from value_server.http.pictures import MOST_GIVEN, Intake
from value_server.model.sight import Seen


class Looks:
    """In the place of a batcher and its looker. asked: what is to be looked at."""

    def __init__(self) -> None:
        self.store = PictureStore(1 << 20)
        self.engine = SimpleNamespace(showing=SimpleNamespace(sight=None, store=self.store))
        self.looker = self
        self.asked: list[tuple[str, Future[None]]] = []

    def look(self, digest: str, body: bytes, most_pixels: int) -> "Future[None]":
        future: Future[None] = Future()
        self.asked.append((digest, future))
        return future

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.asked) < count:
                await asyncio.sleep(0.001)

    def see(self, number: int) -> None:
        digest, future = self.asked[number]
        self.store.add(digest, Seen(torch.zeros(1, 2)))
        future.set_result(None)


@pytest.fixture
def looks() -> Looks:
    return Looks()


def intake(looks: Any) -> Intake:
    return Intake(looks)


def test_one_that_comes_twice_is_looked_at_once(looks: Looks) -> None:
    async def twice() -> None:
        taking = intake(looks)
        tasks = [asyncio.create_task(taking.take("a", b"")) for _ in range(2)]
        await looks.wait_for(1)
        await asyncio.sleep(0.05)
        looks.see(0)
        await asyncio.gather(*tasks)
        await taking.take("a", b"")

    asyncio.run(twice())
    assert [digest for digest, _ in looks.asked] == ["a"]


def test_what_fails_for_one_is_tried_for_the_next(looks: Looks) -> None:
    """As where another has sent other bytes under the same digest."""

    async def twice() -> None:
        taking = intake(looks)
        first, second = (asyncio.create_task(taking.take("a", b"")) for _ in range(2))
        await looks.wait_for(1)
        looks.asked[0][1].set_exception(RequestError("body: none", "body"))
        await looks.wait_for(2)
        looks.see(1)
        await second
        with pytest.raises(RequestError):
            await first

    asyncio.run(twice())


def test_one_whose_client_leaves_is_dropped_and_the_next_ones_is_not(looks: Looks) -> None:
    async def leaves() -> None:
        taking = intake(looks)
        first, second = (asyncio.create_task(taking.take("a", b"")) for _ in range(2))
        await looks.wait_for(1)
        first.cancel()
        await looks.wait_for(2)
        assert looks.asked[0][1].cancelled()
        looks.see(1)
        await second

    asyncio.run(leaves())


def test_what_failed_a_few_times_is_not_looked_at_again(looks: Looks) -> None:
    for number in range(1, MOST_FAILURES + 1):
        assert looks.store.refuse("a", "body: broken") == number
    with pytest.raises(RequestError, match="body: broken"):
        asyncio.run(intake(looks).take("a", b""))
    assert not looks.asked


def test_how_many_may_wait(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same one again takes no place."""
    monkeypatch.setattr(pictures, "MOST_WAITING", 2)

    async def many() -> None:
        taking = intake(looks)
        tasks = [asyncio.create_task(taking.take(digest, b"")) for digest in "abab"]
        await looks.wait_for(2)
        with pytest.raises(BusyError, match="2 pictures wait already"):
            await taking.take("c", b"")
        looks.see(0)
        looks.see(1)
        await asyncio.gather(*tasks)

    asyncio.run(many())


def test_a_text_has_so_many(looks: Looks) -> None:
    digests = ["f" * 64] * MOST_GIVEN
    assert asyncio.run(intake(looks).take_all(digests)) == digests
    with pytest.raises(RequestError, match="pictures: 65, at most 64"):
        asyncio.run(intake(looks).take_all([*digests, "f" * 64]))
