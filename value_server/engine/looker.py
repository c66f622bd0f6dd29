"""Looks at pictures beside the engine, whose passes go on meanwhile.

    body ──▶ one thread, a picture at a time: decode, image processor, tower ──▶ the store

A text whose picture has not been seen yet is one whose picture has not come: it has no values.
"""

import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from value_server.engine.errors import BusyError
from value_server.engine.pictures import read
from value_server.engine.showing import Showing

NICENESS = 10  # of 19; the usual one of work that may wait


class Looker:
    """A thread, which begins with the first picture. Any thread may ask.

    On a CPU it has half of torch's threads, and on Linux a lower priority: passes go first.
    """

    def __init__(self, showing: Showing) -> None:
        self._showing = showing
        self._draining = False
        half = max(1, torch.get_num_threads() // 2)
        self._thread = ThreadPoolExecutor(1, "value-looks", _stand_back, (half,))
        for part in showing.sight.tower.modules():
            part.register_forward_pre_hook(self._check)

    def look(self, digest: str, body: bytes, most_pixels: int) -> "Future[None]":
        """Hold the picture in a file, once its turn has come.

        The future fails with RequestError, where it cannot be seen, or BusyError. To cancel it
        drops a picture whose turn has not come; a look that runs is of use to who asks next.
        """
        self._check()
        given = [body]
        future = self._thread.submit(self._look, digest, given, most_pixels)
        future.add_done_callback(lambda _: given.clear())  # else a cancelled one keeps its place
        return future

    def drain(self) -> None:
        """Refuse what comes and what waits, and give up the look that runs. For signal handlers:
        no lock."""
        self._draining = True

    def stop(self) -> None:
        """End the thread; do not wait for a stuck one."""
        self.drain()
        self._thread.shutdown(wait=False)

    def _look(self, digest: str, given: list[bytes], most_pixels: int) -> None:
        self._check()
        sight, store = self._showing.sight, self._showing.store
        if not store.has(digest):  # one whose client had left was looked at to its end
            self._showing.look(digest, read(sight, store, digest, given[0], most_pixels))

    def _check(self, *_: Any) -> None:
        """Asked in front of each layer, too."""
        if self._draining:
            raise BusyError("the server is shutting down")


def _stand_back(threads: int) -> None:
    """In the thread of the looks, before the first."""
    torch.set_num_threads(threads)  # of this thread, and of those that set no number themselves
    if sys.platform == "linux":  # elsewhere it is a priority of the process
        os.nice(NICENESS)
