"""Pictures to value servers: each once, to all that may need it, whatever goes wrong."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import msgspec
import pytest

from lenvm_vllm.settings import Settings
from lenvm_vllm.values import pictures as values_pictures
from lenvm_vllm.values.pictures import FRESH_S, PictureServers
from tests.support.fakes import INFO

DIGEST = "a" * 64
FILE = {DIGEST: b"a picture"}


class World:
    """Value servers by their hosts. seeing: those that see; others are text-only. statuses: of the
    next PUTs. gate: no PUT is answered while it is shut. there: URLs of pictures that are held;
    None: the servers do not know that question yet."""

    def __init__(self, *seeing: str, **settings: Any) -> None:
        self.seeing = set(seeing)
        self.there: set[str] | None = set()
        self.asked: list[str] = []
        self.put: list[tuple[str, bytes]] = []
        self.statuses: list[Any] = []
        self.gate: asyncio.Event | None = None
        self.counted: Counter[str] = Counter()
        self.now = 0.0
        self.settings = Settings(**settings)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            self.asked.append(request.url.host)
            if "gone" in self.seeing:
                raise httpx.ConnectError("gone")
            info = msgspec.structs.replace(INFO, sees_pictures=request.url.host in self.seeing)
            return httpx.Response(200, content=msgspec.json.encode(info))
        url = str(request.url)
        if request.method == "HEAD":
            if self.there is None:
                return httpx.Response(405)
            return httpx.Response(204 if url in self.there else 404)
        self.put.append((url, await request.aread()))
        if self.gate is not None:
            await self.gate.wait()
        status = self.statuses.pop(0) if self.statuses else 204
        if isinstance(status, Exception):
            raise status
        if status == 204 and self.there is not None:
            self.there.add(url)
        return httpx.Response(status)

    def run(self, work: Callable[[PictureServers], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            servers = PictureServers(
                self.settings,
                lambda name: self.counted.update([name]),
                httpx.MockTransport(self),
                clock=lambda: self.now,
                pauses_s=(0.0, 0.0, 0.0),
            )
            result = await work(servers)
            await servers.settle()
            return result

        return asyncio.run(main())


async def shown(servers: PictureServers, model: str = "m", **files: bytes) -> bool:
    if sees := await servers.see(model):
        servers.give(model, files or FILE)
        await servers.settle()
    return sees


def test_all_that_see_get_it_once() -> None:
    world = World("a", "b", url="http://a/models/x,http://b,http://blind", token="t")

    async def twice(servers: PictureServers) -> None:
        for _ in range(2):
            assert await shown(servers)

    world.run(twice)
    assert sorted(world.put) == [
        (f"http://a/models/x/v1/pictures/{DIGEST}", b"a picture"),
        (f"http://b/v1/pictures/{DIGEST}", b"a picture"),
    ]
    assert sorted(world.asked) == ["a", "b", "blind"]
    assert world.counted == {"pictures": 2}


def test_a_server_that_was_restarted_gets_it_again_at_once() -> None:
    """Or one that let it go: it is asked, and not believed to have what it had."""
    world = World("a", "b", url="http://a,http://b")

    async def restarted(servers: PictureServers) -> None:
        assert await shown(servers)
        assert world.there
        world.there.remove(f"http://a/v1/pictures/{DIGEST}")
        assert await shown(servers)

    world.run(restarted)
    assert [httpx.URL(url).host for url, _ in world.put] == ["a", "b", "a"]


def test_a_server_that_cannot_tell_gets_it_with_each_request() -> None:
    world = World("a", url="http://a")
    world.there = None

    async def twice(servers: PictureServers) -> None:
        for _ in range(2):
            assert await shown(servers)

    world.run(twice)
    assert world.counted == {"pictures": 2}


def test_a_text_only_model_gets_nothing() -> None:
    world = World(url="http://blind")
    assert world.run(shown) is False
    assert not world.put


def test_an_adapters_own_and_those_that_stand_in_for_them() -> None:
    world = World("a", "b", "c", url="http://a", adapters={"sql": "http://b", "law": "http://c"})
    world.run(lambda servers: shown(servers, "sql"))
    assert sorted(httpx.URL(url).host for url, _ in world.put) == ["a", "b"]


def test_one_on_its_way_is_not_sent_again() -> None:
    world = World("a", url="http://a")

    async def at_once(servers: PictureServers) -> None:
        world.gate = asyncio.Event()
        assert await servers.see("m")
        for _ in range(3):
            servers.give("m", FILE)  # returns though nothing is answered
            await asyncio.sleep(0)
        world.gate.set()

    world.run(at_once)
    assert len(world.put) == 1


def test_what_is_believed_is_asked_again_after_a_while() -> None:
    """The server may be another one."""
    world = World("a", url="http://a")

    async def later(servers: PictureServers) -> None:
        assert await shown(servers)
        world.now += FRESH_S
        world.seeing.clear()
        assert await servers.see("m")  # waits for nobody: it was told so before
        await servers.settle()
        assert not await servers.see("m")
        world.now += FRESH_S
        world.seeing.add("a")
        assert await shown(servers)

    world.run(later)
    assert len(world.put) == 1


def test_a_server_that_is_gone_does_not_see_until_it_says() -> None:
    world = World("gone", "a", url="http://a")

    async def gone(servers: PictureServers) -> None:
        assert not await shown(servers)
        world.seeing.discard("gone")
        assert not await shown(servers)  # asked a moment ago
        world.now += FRESH_S
        assert await shown(servers)

    world.run(gone)
    assert world.asked == ["a", "a"]


@pytest.mark.parametrize(
    ("statuses", "tries", "counted"),
    [
        ([503], 2, {"pictures": 1}),
        ([httpx.ReadTimeout("slow"), 429], 3, {"pictures": 1}),
        ([httpx.ConnectError("gone")] * 3, 3, {"lost_pictures": 1}),
        ([413], 1, {"lost_pictures": 1}),
        ([400], 1, {"lost_pictures": 1}),
    ],
)
def test_trouble(
    statuses: list[Any], tries: int, counted: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("vllm").propagate = True
    world = World("a", url="http://a")
    world.statuses = statuses
    world.run(shown)
    assert (len(world.put), world.counted) == (tries, counted)
    assert DIGEST not in caplog.text
    assert ("was not taken" in caplog.text) is ("lost_pictures" in counted)


def test_a_lost_one_is_given_again_with_the_next_request() -> None:
    world = World("a", url="http://a")
    world.statuses = [500] * 3

    async def twice(servers: PictureServers) -> None:
        await shown(servers)
        await shown(servers)

    world.run(twice)
    assert world.counted == {"lost_pictures": 1, "pictures": 1}


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values_pictures, "MOST_HELD", 10)
    world = World("a", url="http://a")

    async def many(servers: PictureServers) -> None:
        await shown(servers, **{"1": b"12345", "2": b"12345", "3": b"1"})
        assert await shown(servers, **{"3": b"1"})

    world.run(many)
    assert world.counted == {"pictures": 3, "lost_pictures": 1}


def test_one_that_hangs_keeps_nothing_from_the_others() -> None:
    world = World("a", "b", url="http://a,http://b")
    files = {str(number): b"x" for number in range(3 * values_pictures.MOST_AT_ONCE)}

    async def hanging(servers: PictureServers) -> None:
        hang = asyncio.Event()

        async def answer(request: httpx.Request) -> httpx.Response:
            if request.url.host == "a":
                await hang.wait()
            return httpx.Response(204 if request.method == "PUT" else 404)

        assert await servers.see("m")
        for server in servers._of("m"):
            server.http = httpx.AsyncClient(
                transport=httpx.MockTransport(answer), base_url=server.url
            )
        servers.give("m", files)
        while world.counted["pictures"] < len(files):
            await asyncio.sleep(0)
        hang.set()

    world.run(hanging)
    assert world.counted == {"pictures": 2 * len(files)}
