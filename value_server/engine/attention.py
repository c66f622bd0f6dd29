"""Attention of one flat pass over all sessions, as a function of transformers' attention interface.

The queries of a pass are new tokens and candidates of many sessions, one session's row after the
other: (1, heads, Q, D). Each layer writes their keys and values into the pool first; then every
row reads the slots of its own text from it, in groups of one kernel call each.

Legend: Q queries of the pass; R rows of a group, n their queries and S the slots that they see,
with padding; Hkv key/value heads, G query heads per key/value head, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from value_server.engine.job import Row
from value_server.engine.memory import KVPool, on_device

NAME = "lenvm_slots"
ALONE_QUERIES = 64  # a row with no more is cheaper alone, on a CPU
GROUP_AREA = 1 << 16  # slots that one kernel call gathers at most
Kind = Literal["gathered", "triton"]
BUCKET = 64  # slots; for each new number of them oneDNN makes a new kernel, dearer than the product


class Rows(Protocol):
    """Some rows of a pass, or all, and how their attention is computed."""

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        scaling: float,
        window: int | None,
    ) -> None:
        """query (Hkv * G, Q, D), keys and values (Hkv, slots, D); fills its rows of `out`
        (Q, Hkv * G, D)."""


class Group:
    """Rows of a pass that are computed together, padded to one shape.

    A row alone has no padding among its queries, and plain products are up to twice as fast for
    it as the fused kernel.
    """

    def __init__(
        self, rows: Sequence[Row], padding: int, device: torch.device, alone: bool = False
    ) -> None:
        """padding: a slot that nobody uses."""
        self.rows, self.alone = rows, alone
        self.padding, self.device = padding, device
        self.height = max(row.queries for row in rows)
        self._plans: dict[tuple[int | None, int, torch.dtype], tuple[Tensor, Tensor]] = {}
        if not alone:
            self._index_queries()

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        scaling: float,
        window: int | None,
    ) -> None:
        """See Rows."""
        heads = keys.shape[0]
        per_key = query.shape[0] // heads
        slots, bias = self._plan(window, per_key, query.dtype)
        # To gather costs next to nothing beside the products, which are up to twice as fast on
        # keys that lie together as on a view into the pool.
        k, v = keys.index_select(1, slots), values.index_select(1, slots)  # (Hkv, R * S, D)
        # Below, the G heads that share keys become G * n queries of one head: nothing is repeated.
        if self.alone:
            place = self.rows[0].place
            q = query[:, place].reshape(heads, -1, query.shape[2])  # (Hkv, G * n, D)
            scores = torch.baddbmm(bias[0], q, k.transpose(1, 2), alpha=scaling)
            o = scores.softmax(-1).bmm(v)
            out[place] = o.view(-1, self.height, o.shape[2]).transpose(0, 1)
            return
        q = query[:, self._queries].unflatten(0, (heads, per_key))  # (Hkv, G, R, n, D)
        q = q.permute(2, 0, 1, 3, 4).flatten(2, 3)  # (R, Hkv, G * n, D)
        k = k.unflatten(1, (len(self.rows), -1)).transpose(0, 1)
        v = v.unflatten(1, (len(self.rows), -1)).transpose(0, 1)
        o = scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None], scale=scaling)
        o = o.unflatten(2, (per_key, self.height)).permute(0, 3, 1, 2, 4)
        o = o.flatten(2, 3).flatten(0, 1)  # (R * n, Hkv * G, D)
        out.index_copy_(0, self._targets, o.index_select(0, self._real))

    def _index_queries(self) -> None:
        queries = np.zeros((len(self.rows), self.height), dtype=np.int64)  # padding repeats query 0
        real = np.zeros(queries.shape, dtype=bool)
        for i, row in enumerate(self.rows):
            queries[i, : row.queries] = np.arange(row.place.start, row.place.stop)
            real[i, : row.queries] = True
        self._queries = on_device(queries, self.device)  # (R, n) indices into the pass
        self._real = on_device(np.flatnonzero(real), self.device)  # into the R * n
        self._targets = on_device(queries[real], self.device)  # the same, into the pass

    def _plan(self, window: int | None, per_key: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(R * S,) slots and (R, G * n, S) bias, the same for all layers with the same window."""
        if window is not None and all(row.end < window for row in self.rows):
            window = None  # it cuts nothing
        key = (window, per_key, dtype)
        if key not in self._plans:
            self._plans[key] = self._build(window, per_key, dtype)
        return self._plans[key]

    def _build(self, window: int | None, per_key: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # What no query of a row sees is not looked at.
        firsts = [0 if window is None else max(0, row.begin - window + 1) for row in self.rows]
        own = [row.slots(first) for row, first in zip(self.rows, firsts, strict=True)]
        width = -(-max(map(len, own)) // BUCKET) * BUCKET
        slots = np.full((len(self.rows), width), self.padding, dtype=np.int64)
        hidden = np.ones((len(self.rows), self.height, width), dtype=bool)
        hidden[:, :, 0] = False  # no padded query sees nothing at all: that would be NaN
        for i, (row, first) in enumerate(zip(self.rows, firsts, strict=True)):
            slots[i, : len(own[i])] = own[i]
            hidden[i, : row.queries, : len(own[i])] = ~row.mask(first, window)
        bias = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
        bias.masked_fill_(on_device(hidden, self.device), float("-inf"))
        return on_device(slots.reshape(-1), self.device), bias.repeat(1, per_key, 1)


def fastest(device: torch.device) -> Kind:
    """Triton comes with torch for CUDA."""
    return "triton" if device.type == "cuda" and find_spec("triton") else "gathered"


def planned(
    rows: Sequence[Row], padding: int, device: torch.device, kind: Kind, per_key: int
) -> Sequence[Rows]:
    """All rows of a pass. per_key: G, of most layers."""
    if kind == "gathered":
        return groups_of(rows, padding, device)
    from value_server.engine.triton_attention import Tiles

    return [Tiles.of(rows, per_key, device)]


def groups_of(rows: Sequence[Row], padding: int, device: torch.device) -> list[Group]:
    """All rows of a pass: short ones alone, on a CPU; the others with rows of a similar shape."""
    few = ALONE_QUERIES if device.type == "cpu" else 0
    groups = [Group([row], padding, device, alone=True) for row in rows if row.queries <= few]
    shapes: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        if row.queries > few:
            # Powers of two: at most half of a group is padding in either direction.
            width = (row.end + len(row.scored) - 1).bit_length()
            shapes.setdefault(((row.queries - 1).bit_length(), width), []).append(row)
    for (_, width), alike in shapes.items():
        most = max(1, GROUP_AREA >> width)
        parts = (alike[i : i + most] for i in range(0, len(alike), most))
        groups += [Group(part, padding, device) for part in parts]
    return groups


@dataclass(frozen=True)
class Pass:
    """What the attention function needs to know; handed through the model as a keyword.

    written: (Q,) slot of each query.
    windows: layer → its sliding window, for the attention to note.
    """

    pool: KVPool
    written: Tensor
    groups: Sequence[Rows]
    windows: dict[int, int | None]


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    lenvm_pass: Pass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, Hkv * G, Q, D), key and value (1, Hkv, Q, D) → (1, Q, Hkv * G, D)."""
    if lenvm_pass is None:
        raise RuntimeError("the model does not hand keywords through to its attention")
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attention with {name!r} is not supported")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    lenvm_pass.windows[layer] = sliding_window
    keys, values = lenvm_pass.pool.layer(layer, key, value)
    keys.index_copy_(1, lenvm_pass.written, key[0])
    values.index_copy_(1, lenvm_pass.written, value[0])
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    for group in lenvm_pass.groups:
        group.attend(query[0], keys, values, out, scale, sliding_window)
    return out[None], None


# No mask function goes with it: none is built.
AttentionInterface.register(NAME, slot_attention)
