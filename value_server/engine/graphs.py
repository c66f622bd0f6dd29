"""Passes as CUDA graphs: one launch for hundreds that are dearer than their work.

A graph is for a number of queries and tiles, rounded up, and for texts of any length: what differs
from pass to pass lies in one buffer that all graphs read, and comes to the device as one copy.

    buffer   [ tokens | positions | written | tiles | slots of all rows ]

Filling has token 0 at position 0, is written to the spare slot, and is in no tile.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from value_server.engine.attention import Pass
from value_server.engine.memory import KVPool
from value_server.engine.shares import Shares
from value_server.engine.triton_attention import FIELDS, Tiles, tile_queries, tiles_of

log = logging.getLogger(__name__)

MOST_QUERIES = 4096  # of a pass; a larger one has work enough
MOST_SLOTS = 1 << 22  # of the rows of a pass, 16 MB
MOST_GRAPHS = 64
CLOSE = 0.02  # the same kernels on the same numbers: next to no difference
HEADER = (3 + FIELDS.value) * MOST_QUERIES

Forward = Callable[[Tensor, Tensor, Pass], Tensor]


def rounded(number: int) -> int:
    """Up to a power of two, from 64 on to a multiple that adds an eighth or so."""
    if number <= 64:
        return 1 << (number - 1).bit_length()
    step = max(64, 1 << (number - 1).bit_length() - 3)
    return -(-number // step) * step


class Graphs:
    """On a CPU nothing is captured: passes are run over the same buffer."""

    def __init__(
        self, forward: Forward, pool: KVPool, windows: dict[int, int | None], device: torch.device
    ) -> None:
        """forward: (1, Q) tokens, (1, Q) positions and the pass → (Q, n) numbers, on the device.
        windows: see Pass."""
        self._forward, self._pool, self._windows, self._device = forward, pool, windows, device
        on_gpu = device.type == "cuda"
        self._here = torch.zeros(HEADER + MOST_SLOTS, dtype=torch.int32, pin_memory=on_gpu)
        self._there = torch.zeros_like(self._here, device=device)
        self._host: NDArray[np.int32] = self._here.numpy()
        self._seen: Counter[tuple[int, int, int]] = Counter()
        self._graphs: dict[tuple[int, int, int], Callable[[], Tensor]] = {}
        self._memory: Any = None
        self._works = True

    def run(self, shares: Shares, per_key: int, *given: NDArray[Any]) -> Tensor | None:
        """(Q, n), until the next pass; None for a pass that has no graph, or not yet.

        given: tokens, positions and written, (Q,) each.
        """
        queries = tile_queries(shares, per_key)
        tiles = tiles_of(shares, queries)
        count = len(given[0])
        key = (rounded(count), rounded(len(tiles)), queries)
        slots = int(shares.sizes.sum())
        self._seen[key] += 1
        if not self._works or count > MOST_QUERIES or slots > MOST_SLOTS:
            return None
        if key not in self._graphs and (self._seen[key] < 2 or len(self._graphs) >= MOST_GRAPHS):
            return None  # the first pass of a kind compiles what it needs
        self._fill(tiles, given, shares.slots)
        if key not in self._graphs and not self._add(key, count):
            return None
        return self._graphs[key]()[:count]

    def _fill(
        self,
        tiles: NDArray[np.int32],
        given: Sequence[NDArray[Any]],
        slots: NDArray[np.int32],
    ) -> None:
        columns = self._host[: 3 * MOST_QUERIES].reshape(3, MOST_QUERIES)
        for column, numbers, filling in zip(columns, given, (0, 0, self._pool.spare), strict=True):
            column[: len(numbers)] = numbers
            column[len(numbers) :] = filling
        table = self._host[3 * MOST_QUERIES : HEADER]
        table[: tiles.size] = tiles.reshape(-1)
        table[tiles.size :] = 0
        end = HEADER + len(slots)
        self._host[HEADER:end] = slots
        self._there[:end].copy_(self._here[:end], non_blocking=True)

    def _add(self, key: tuple[int, int, int], count: int) -> bool:
        """The graph of the pass in the buffer, of `count` queries; whether that went well."""
        size, tiles, queries = key
        tokens, positions, written = (
            self._there[i * MOST_QUERIES : i * MOST_QUERIES + size] for i in range(3)
        )
        table = self._there[3 * MOST_QUERIES : HEADER].view(-1, FIELDS.value)[:tiles]
        planned = Tiles(table, self._there[HEADER:], queries)

        def forward() -> Tensor:
            known = Pass(self._pool, written.long(), [planned], self._windows)
            return self._forward(tokens[None], positions[None], known)

        try:
            self._graphs[key] = self._captured(forward, count)
        except Exception as error:  # of the driver, of Triton, of a model that asks the device
            log.warning("value engine: goes on without CUDA graphs: %r", error)
            self._works = False
        return self._works

    def _captured(self, forward: Callable[[], Tensor], count: int) -> Callable[[], Tensor]:
        """Raises RuntimeError for a graph whose first `count` rows are not those of the pass."""
        if self._device.type != "cuda":
            return forward
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            expected = forward()  # it compiles, and takes its workspaces
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            found = forward()

        def replay() -> Tensor:
            graph.replay()
            return found

        close = partial(torch.allclose, rtol=CLOSE, atol=CLOSE, equal_nan=True)
        if not close(replay()[:count], expected[:count]):
            raise RuntimeError("a graph gives other numbers than its pass")

        return replay
