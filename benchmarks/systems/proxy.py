"""A TCP proxy that spoils what comes back through it."""

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Iterator
from typing import Literal

from lenvm_vllm.commands.processes import free_port

Spoils = Literal["nothing", "lag", "corrupt", "cut", "trickle"]

LAG_S = 3.0  # longer than a step waits
PIECE_S = 0.2  # between the bytes of a trickle


class Proxy:
    """Loopback port `port` → `target`, as long as its block lasts.

    Spoils: lag, every piece of an answer comes late; corrupt, some of its bits are flipped; cut,
    the connection breaks in the middle; trickle, it comes byte by byte.
    """

    def __init__(self, target: int, seed: int = 0) -> None:
        self.port = free_port()
        self.spoils: Spoils = "nothing"
        self._target = target
        self._draw = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        listening = asyncio.start_server(self._serve, "127.0.0.1", self.port)
        asyncio.run_coroutine_threadsafe(listening, self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @contextlib.contextmanager
    def spoilt(self, how: Spoils) -> Iterator[None]:
        """As long as the block lasts."""
        self.spoils = how
        yield
        self.spoils = "nothing"

    async def _serve(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        try:
            server, forth = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            back.close()
            return
        with contextlib.suppress(OSError):
            await asyncio.wait(
                [
                    asyncio.ensure_future(self._pump(client, forth, spoilt=False)),
                    asyncio.ensure_future(self._pump(server, back, spoilt=True)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        forth.transport.abort()
        back.transport.abort()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, spoilt: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                if not spoilt or self.spoils == "nothing":
                    sink.write(data)
                elif not await self._spoil(bytearray(data), sink):
                    return
                await sink.drain()

    async def _spoil(self, data: bytearray, sink: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        if self.spoils == "lag":
            await asyncio.sleep(LAG_S)
        elif self.spoils == "corrupt":
            for _ in range(1 + len(data) // 64):
                data[self._draw.randrange(len(data))] ^= 1 << self._draw.randrange(8)
        elif self.spoils == "cut":
            sink.write(data[: len(data) // 2])
            return False
        elif self.spoils == "trickle":
            end = time.monotonic() + LAG_S
            while data and time.monotonic() < end:
                sink.write(data[:1])
                await sink.drain()
                del data[:1]
                await asyncio.sleep(PIECE_S)
        sink.write(data)
        return True
