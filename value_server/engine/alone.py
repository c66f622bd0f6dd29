"""Attention of one row with few queries: its text is gathered and nothing is padded.

Gathering costs next to nothing beside the products, which are up to twice as fast on keys that
lie together as on a view into the pool. A text is filled up to a multiple of BUCKET slots: for
each new shape oneDNN makes a new kernel, which takes longer than the product.

Legend: as in attention.py; S gathered slots.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from value_server.engine.attention import Row

BUCKET = 64


@dataclass(frozen=True)
class _Plan:
    """slots: (S,). bias: (G * n, S), 0 or -inf."""

    slots: Tensor
    bias: Tensor


@dataclass
class Alone:
    """One row."""

    row: Row
    padding: int  # a slot that nobody uses
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
        # The G heads that share keys become G * n queries of one head: nothing is repeated.
        q = query[:, first : first + n].reshape(heads, -1, query.shape[2])
        k, v = keys.index_select(1, plan.slots), values.index_select(1, plan.slots)
        scores = torch.baddbmm(plan.bias, q, k.transpose(1, 2), alpha=scaling)
        o = scores.softmax(-1).bmm(v)  # (Hkv, G * n, D)
        out[first : first + n] = o.view(-1, n, o.shape[2]).transpose(0, 1)

    def _plan(self, window: int | None, per_key: int, dtype: torch.dtype) -> _Plan:
        """The same for all layers with the same window."""
        if window is not None and len(self.row.path) < window:
            window = None  # it cuts nothing
        key = (window, per_key, dtype)
        if key not in self._plans:
            self._plans[key] = self._build(window, per_key, dtype)
        return self._plans[key]

    def _build(self, window: int | None, per_key: int, dtype: torch.dtype) -> _Plan:
        path, old = self.row.path, len(self.row.path) - self.row.new
        # What no query sees is not looked at.
        first = 0 if window is None else max(0, old - window + 1)
        slots = np.concatenate([path[first:], self.row.candidates])
        more = -len(slots) % BUCKET
        slots = np.pad(slots, (0, more), constant_values=self.padding)
        seen = np.pad(self.row.mask(first, window), ((0, 0), (0, more)))
        bias = torch.zeros(seen.shape, dtype=dtype)
        bias.masked_fill_(torch.from_numpy(~seen), float("-inf"))
        return _Plan(torch.from_numpy(slots), bias.repeat(per_key, 1))
