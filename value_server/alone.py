"""Attention of one row with few queries: its text is read where it lies.

The slots of a text come in runs: a prompt is given slots in one piece. The longest run is read
in place; what is left of the text, the new tokens and the candidates is gathered.

    path:  [ run: a view, seen by all queries ] [ rest ] [ new ] | candidates
                                                 └──── gathered, masked ────┘

Legend: as in attention.py; T gathered slots.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from value_server.attention import Row

SHORTEST_RUN = 256  # a shorter one is gathered faster than it is treated apart


@dataclass(frozen=True)
class _Plan:
    """run: first slot and the one after the last. slots: (T,). bias: (n, T), 0 or -inf."""

    run: tuple[int, int]
    slots: Tensor
    bias: Tensor


@dataclass
class Alone:
    """One row."""

    row: Row
    _plans: dict[tuple[int | None, int, torch.dtype], _Plan] = field(default_factory=dict)

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        scaling: float,
        window: int | None,
    ) -> None:
        """See attention.Part."""
        first, n, heads = self.row.first, self.row.queries, keys.shape[0]
        plan = self._plan(window, query.shape[0] // heads, query.dtype)
        start, end = plan.run
        # The G heads that share keys become G * n queries of one head: nothing is repeated.
        q = query[:, first : first + n].reshape(heads, -1, query.shape[2])
        gathered = keys.index_select(1, plan.slots).transpose(1, 2)
        scores = torch.baddbmm(plan.bias, q, gathered, alpha=scaling)
        if end > start:
            in_run = (q * scaling).bmm(keys[:, start:end].transpose(1, 2))
            scores = torch.cat([in_run, scores], dim=-1)
        p = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        o = p[..., end - start :].bmm(values.index_select(1, plan.slots))  # (Hkv, G * n, D)
        if end > start:
            o.baddbmm_(p[..., : end - start], values[:, start:end])
        out[first : first + n] = o.view(-1, n, o.shape[2]).transpose(0, 1)

    def _plan(self, window: int | None, per_key: int, dtype: torch.dtype) -> _Plan:
        """The same for all layers with the same window."""
        old = len(self.row.path) - self.row.new
        if window is not None and len(self.row.path) < window:
            window = None  # it cuts nothing
        key = (window, per_key, dtype)
        if key not in self._plans:
            self._plans[key] = self._build(old, window, per_key, dtype)
        return self._plans[key]

    def _build(self, old: int, window: int | None, per_key: int, dtype: torch.dtype) -> _Plan:
        path = self.row.path
        if window is None:
            start, end = longest_run(path[:old])
            first = 0
        else:  # what no query sees is not looked at
            start, end = 0, 0
            first = max(0, old - window + 1)
        kept = np.ones(len(path) - first, dtype=bool)
        kept[start:end] = False
        mask = self.row.mask(first, window)
        mask = mask[:, np.concatenate([kept, np.ones(len(self.row.candidates), dtype=bool)])]
        slots = np.concatenate([path[first:][kept], self.row.candidates])
        bias = torch.zeros(mask.shape, dtype=dtype).masked_fill_(
            torch.from_numpy(~mask), float("-inf")
        )
        run = (int(path[start]), int(path[start]) + end - start) if end > start else (0, 0)
        return _Plan(run, torch.from_numpy(slots), bias.repeat(per_key, 1))


def longest_run(path: NDArray[np.int64]) -> tuple[int, int]:
    """[start, end) of the longest stretch of `path` that counts up by one, (0, 0) if short."""
    edges = np.flatnonzero(np.diff(path) != 1) + 1
    edges = np.concatenate([[0], edges, [len(path)]])
    longest = int(np.diff(edges).argmax())
    start, end = int(edges[longest]), int(edges[longest + 1])
    return (start, end) if end - start >= SHORTEST_RUN else (0, 0)
