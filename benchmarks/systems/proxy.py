"""A TCP proxy that spoils what comes back through it."""

import contextlib
import random
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal, Self

Spoils = Literal["nothing", "lag", "corrupt", "cut", "trickle"]

LAG_S = 3.0  # longer than a step waits
PIECE_S = 0.2  # between the bytes of a trickle


class Proxy(socketserver.ThreadingTCPServer):
    """Loopback port `port` → `target`, as long as its block lasts.

    Spoils: lag, every answer comes late; corrupt, some of its bits are flipped; cut,
    the connection breaks in the middle; trickle, it comes byte by byte.
    """

    daemon_threads, block_on_close = True, False

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.port: int = self.server_address[1]
        self._target, self._spoils, self._draw = target, "nothing", random.Random(0)
        self._lag_s = LAG_S

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @contextlib.contextmanager
    def spoilt(self, how: Spoils, lag_s: float = LAG_S) -> Iterator[None]:
        """As long as the block lasts."""
        self._spoils, self._lag_s = how, lag_s
        yield
        self._spoils = "nothing"

    def finish_request(self, request: Any, client_address: Any) -> None:
        """One connection, in a thread of its own."""
        target = ("127.0.0.1", self._target)
        with contextlib.suppress(OSError), socket.create_connection(target) as server:
            for end in (request, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            forth = threading.Thread(target=_pump, args=(request, server, _whole), daemon=True)
            forth.start()
            _pump(server, request, self._pieces)

    def _pieces(self, data: bytearray) -> Iterator[bytearray]:
        """What of an answer goes on, and when. Raises OSError where it breaks."""
        if self._spoils == "lag" and data.startswith(b"HTTP/"):
            time.sleep(self._lag_s)
        elif self._spoils == "corrupt":
            for _ in range(1 + len(data) // 64):
                data[self._draw.randrange(len(data))] ^= 1 << self._draw.randrange(8)
        elif self._spoils == "cut":
            yield data[: len(data) // 2]
            raise ConnectionAbortedError
        elif self._spoils == "trickle":
            end = time.monotonic() + LAG_S
            while data and time.monotonic() < end:
                yield data[:1]
                del data[:1]
                time.sleep(PIECE_S)
        yield data


def _whole(data: bytearray) -> Iterator[bytearray]:
    yield data


def _pump(source: socket.socket, sink: socket.socket, pieces: Any) -> None:
    """Until one of both ends, and then neither goes on."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            for piece in pieces(bytearray(data)):
                sink.sendall(piece)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
