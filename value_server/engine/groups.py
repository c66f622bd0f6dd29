"""Attention of many rows at once: rows of similar shape are padded to a group.

Legend: as in attention.py; R rows of a group, n their queries and S their slots with padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from value_server.engine.attention import Row
from value_server.engine.memory import on_device

GROUP_AREA = 1 << 16  # slots that one kernel call gathers at most


@dataclass
class Group:
    """Rows padded to one shape.

    queries: (R, n) indices into the pass; padding repeats query 0.
    real: indices of those that are not padding, into the R * n.
    targets: the same queries' indices into the pass.
    slots: (R * S,) indices into the pool.
    """

    rows: Sequence[Row]
    queries: Tensor
    real: Tensor
    targets: Tensor
    slots: Tensor
    device: torch.device
    _biases: dict[tuple[int | None, int, torch.dtype], Tensor] = field(default_factory=dict)

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
        (rows, height), heads = self.queries.shape, keys.shape[0]
        per_key = query.shape[0] // heads
        # The G heads that share keys become G * n queries of one head: nothing is repeated.
        q = query[:, self.queries].unflatten(0, (heads, per_key))  # (Hkv, G, R, n, D)
        q = q.permute(2, 0, 1, 3, 4).flatten(2, 3)  # (R, Hkv, G * n, D)
        k = keys.index_select(1, self.slots).unflatten(1, (rows, -1)).transpose(0, 1)
        v = values.index_select(1, self.slots).unflatten(1, (rows, -1)).transpose(0, 1)
        bias = self._bias(window, per_key, q.dtype)
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling)
        o = o.unflatten(2, (per_key, height)).permute(0, 3, 1, 2, 4)
        o = o.flatten(2, 3).flatten(0, 1)  # (R * n, Hkv * G, D)
        out.index_copy_(0, self.targets, o.index_select(0, self.real))

    def _bias(self, window: int | None, per_key: int, dtype: torch.dtype) -> Tensor:
        """Additive mask (R, 1, G * n, S), the same for all layers with the same window."""
        key = (window, per_key, dtype)
        if key not in self._biases:
            mask = np.zeros((*self.queries.shape, len(self.slots) // len(self.rows)), dtype=bool)
            mask[:, :, 0] = True  # no padded query sees nothing at all: that would be NaN
            for i, row in enumerate(self.rows):
                own = row.mask(window=window)
                mask[i, : own.shape[0], : own.shape[1]] = own
            hidden = on_device(~mask, self.device)
            bias = torch.zeros(mask.shape, dtype=dtype, device=self.device)
            bias.masked_fill_(hidden, float("-inf"))
            self._biases[key] = bias.repeat(1, per_key, 1)[:, None]
        return self._biases[key]


def group_rows(rows: Sequence[Row], padding: int, device: torch.device) -> list[Group]:
    """Groups on the device. padding: a slot that nobody uses."""
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        # Powers of two: at most half of a group is padding in either direction.
        width = (len(row.path) + len(row.candidates) - 1).bit_length()
        key = ((row.queries - 1).bit_length(), width)
        part = len(groups.get(key, ()))
        groups.setdefault((*key, (part << width) // GROUP_AREA), []).append(row)
    return [_build(group, padding, device) for group in groups.values()]


def _build(rows: Sequence[Row], padding: int, device: torch.device) -> Group:
    height = max(row.queries for row in rows)
    width = max(len(row.path) + len(row.candidates) for row in rows)
    queries = np.zeros((len(rows), height), dtype=np.int64)
    real = np.zeros((len(rows), height), dtype=bool)
    slots = np.full((len(rows), width), padding, dtype=np.int64)
    for i, row in enumerate(rows):
        n, seen = row.queries, np.concatenate([row.path, row.candidates])
        queries[i, :n] = np.arange(row.first, row.first + n)
        real[i, :n] = True
        slots[i, : len(seen)] = seen
    return Group(
        rows,
        on_device(queries, device),
        on_device(np.flatnonzero(real), device),
        on_device(queries[real], device),
        on_device(slots.reshape(-1), device),
        device,
    )
