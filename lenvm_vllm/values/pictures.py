"""Gives pictures to the value servers, each once, while the requests that they belong to go on."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from lenvm_vllm.settings import Settings
from lenvm_vllm.values.endpoint import async_http_client
from value_server.contract import wire

logger = logging.getLogger("vllm.lenvm")

FRESH_S = 10.0  # for which it is believed what a server told of its model
PAUSES_S = (0.0, 0.5, 2.0)  # before each try to give one
LONGEST_PUT = 16  # times the time-out: a server may look at a picture before it answers
MOST_AT_ONCE = 4  # to each server
MOST_HELD = 256 << 20  # bytes of pictures that wait to be given; others are lost


@dataclass(eq=False)
class _Server:
    """url: for the log. sees: whether its model sees pictures, as it told at `told_at`.
    wanting: digests of pictures on their way."""

    url: str
    http: httpx.AsyncClient
    sees: bool = False
    told_at: float = -FRESH_S
    question: "asyncio.Task[None] | None" = None
    wanting: set[str] = field(default_factory=set)
    at_once: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_AT_ONCE))
    complained: bool = False


class PictureServers:
    """One per API server process; belongs to its event loop."""

    def __init__(
        self,
        settings: Settings,
        count: Callable[[str], None],
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        pauses_s: tuple[float, ...] = PAUSES_S,
    ) -> None:
        """Connects to nothing yet. count: of metrics, by their names."""
        options = settings.connection
        servers = {
            url: _Server(url, async_http_client(url, transport=transport, **options))
            for url in settings.servers
        }
        own = {**settings.adapters, "": settings.url}
        self._servers_of = {name: [servers[url] for url in urls] for name, urls in own.items()}
        self._timeout_s = settings.timeout_s
        self._put_timeout = httpx.Timeout(
            LONGEST_PUT * settings.timeout_s, connect=settings.timeout_s
        )
        self._pauses_s = pauses_s
        self._count, self._clock = count, clock
        self._tasks: set[asyncio.Task[None]] = set()
        self._held = 0

    async def see(self, model: str) -> bool:
        """Whether any server that a text of this model may live on sees pictures. Waits for none
        that has told so before."""
        servers = self._of(model)
        for server in servers:
            if self._clock() - server.told_at >= FRESH_S and server.question is None:
                server.question = self._begin(self._ask(server))
        questions = [server.question for server in servers if server.question]
        if questions and not any(server.sees for server in servers):
            await asyncio.wait(questions)
        return any(server.sees for server in servers)

    def give(self, model: str, pictures: Mapping[str, bytes]) -> None:
        """Put pictures, by their digests, on all servers that a text of this model may live on and
        that do not have them."""
        for server in self._of(model):
            for digest, data in pictures.items():
                if not server.sees or digest in server.wanting:
                    continue
                if self._held + len(data) > MOST_HELD:
                    self._count("lost_pictures")
                    continue
                server.wanting.add(digest)
                self._held += len(data)
                self._begin(self._give(server, digest, data))

    async def settle(self) -> None:
        """Until nothing is on its way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _of(self, model: str) -> list[_Server]:
        """An adapter's own, where it has some, and the base model's, which stand in for them."""
        names = (model, "") if model in self._servers_of else ("",)
        return list(dict.fromkeys(server for name in names for server in self._servers_of[name]))

    def _begin(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _ask(self, server: _Server) -> None:
        """One that does not answer is believed what it told last."""
        try:
            reply = await server.http.get(wire.MODEL_PATH, timeout=self._timeout_s / 8)
            if reply.is_success:
                info = msgspec.json.decode(reply.content, type=wire.ModelInfo)
                server.sees = info.sees_pictures and info.version == wire.WIRE_VERSION
        except (httpx.HTTPError, httpx.InvalidURL, OSError, msgspec.MsgspecError):
            pass
        finally:
            server.told_at, server.question = self._clock(), None

    async def _give(self, server: _Server, digest: str, data: bytes) -> None:
        try:
            async with server.at_once:
                if not await self._has(server, digest):
                    taken = await self._put(server, digest, data)
                    self._count("pictures" if taken else "lost_pictures")
        finally:
            server.wanting.discard(digest)
            self._held -= len(data)

    async def _has(self, server: _Server, digest: str) -> bool:
        """Whether it has the picture, which it is asked each time: it may have been restarted, or
        have let it go. One that does not know the question gets the picture."""
        try:
            reply = await server.http.head(
                f"{wire.PICTURES_PATH}/{digest}", timeout=self._timeout_s
            )
        except (httpx.HTTPError, httpx.InvalidURL, OSError):
            return False
        return reply.is_success

    async def _put(self, server: _Server, digest: str, data: bytes) -> bool:
        """Whether it has the picture now. The log tells no more than that one was not taken."""
        trouble = ""
        for pause in self._pauses_s:
            await asyncio.sleep(pause)
            try:
                reply = await server.http.put(
                    f"{wire.PICTURES_PATH}/{digest}",
                    content=data,
                    timeout=self._put_timeout,
                )
            except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                trouble = type(error).__name__
                continue
            if reply.is_success:
                server.complained = False
                return True
            trouble = f"HTTP {reply.status_code}"
            if reply.status_code < 500 and reply.status_code not in (408, 429):
                break  # it never takes this one
        if not server.complained:
            logger.warning(
                "value server %s: a picture was not taken (%s); its text has no values",
                *(server.url, trouble),
            )
        server.complained = True
        return False
