"""Attention of one flat pass over all sessions, as a function of transformers' attention interface.

The queries of a pass are new tokens and candidates of many sessions, one session's row after the
other: (1, heads, Q, D). Each layer writes their keys and values into the pool first; then every
row reads the slots of its own text from it, in groups of one kernel call each.

Legend: Q queries of the pass; R rows of a group, n their queries and S the slots that they see,
with padding; Hkv key/value heads, G query heads per key/value head, D head dimension.
"""

from collections.abc import Iterator, Sequence
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
SHORT_QUERIES = 64  # a row with no more is cheaper by plain products, on a CPU
SHORT_AREA = 1 << 13  # slots that these gather at a time; half or double is slower
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

    Short rows of equally many queries have no padding among these, and plain products are up to
    twice as fast for them as the fused kernel.
    """

    def __init__(
        self, rows: Sequence[Row], padding: int, device: torch.device, short: bool = False
    ) -> None:
        """padding: a slot that nobody uses."""
        self.rows, self.short = rows, short
        self.padding, self.device = padding, device
        self.height = max(row.queries for row in rows)
        self._plans: dict[tuple[int | None, int, int, torch.dtype], tuple[Tensor, Tensor]] = {}
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
        slots, bias = self._plan(window, heads, per_key, query.dtype)
        # To gather costs next to nothing beside the products, which are up to twice as fast on
        # keys that lie together as on a view into the pool.
        k, v = keys.index_select(1, slots), values.index_select(1, slots)  # (Hkv, R * S, D)
        k = k.unflatten(1, (len(self.rows), -1))  # (Hkv, R, S, D)
        v = v.unflatten(1, (len(self.rows), -1))
        # Below, the G heads that share keys become G * n queries of one head: nothing is repeated.
        q = query[:, self._queries].unflatten(0, (heads, per_key))  # (Hkv, G, R, n, D)
        q = q.transpose(1, 2).flatten(2, 3)  # (Hkv, R, G * n, D)
        if self.short:
            keys_of_rows = k.flatten(0, 1).transpose(1, 2)  # (Hkv * R, D, S)
            scores = torch.baddbmm(bias, q.flatten(0, 1), keys_of_rows, alpha=scaling)
            o = scores.softmax(-1).bmm(v.flatten(0, 1)).view(q.shape)
        else:
            mask = bias[None]  # the same for all Hkv
            o = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        o = o.unflatten(2, (per_key, self.height)).permute(1, 3, 0, 2, 4)
        o = o.flatten(2, 3).flatten(0, 1)  # (R * n, Hkv * G, D)
        out.index_copy_(0, self._targets, o if self.short else o.index_select(0, self._real))

    def _index_queries(self) -> None:
        queries = np.zeros((len(self.rows), self.height), dtype=np.int64)  # padding repeats query 0
        real = np.zeros(queries.shape, dtype=bool)
        for i, row in enumerate(self.rows):
            queries[i, : row.queries] = np.arange(row.place.start, row.place.stop)
            real[i, : row.queries] = True
        self._queries = on_device(queries, self.device)  # (R, n) indices into the pass
        self._real = on_device(np.flatnonzero(real), self.device)  # into the R * n
        self._targets = on_device(queries[real], self.device)  # the same, into the pass

    def _plan(
        self, window: int | None, heads: int, per_key: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """(R * S,) slots and (R, G * n, S) bias, or (Hkv * R, G * n, S) for short rows; the same
        for all layers with the same window."""
        if window is not None and all(row.end < window for row in self.rows):
            window = None  # it cuts nothing
        key = (window, heads, per_key, dtype)
        if key not in self._plans:
            slots, bias = self._build(window, dtype)
            bias = bias.repeat(heads if self.short else 1, per_key, 1)
            self._plans[key] = slots, bias
        return self._plans[key]

    def _build(self, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(R * S,) slots and (R, n, S) bias."""
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
        return on_device(slots.reshape(-1), self.device), bias


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
    """All rows of a pass, each with rows of a similar shape; short ones apart, on a CPU."""
    few = SHORT_QUERIES if device.type == "cpu" else 0
    short = _alike([row for row in rows if row.queries <= few])
    groups = [Group(part, padding, device, short=True) for part in short]
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


def _alike(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Short rows of equally many queries, at most a quarter of the slots padding."""
    part: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.queries, _width(row))):
        width = _width(row)
        if part and (
            row.queries > part[0].queries
            or 4 * _width(part[0]) < 3 * width
            or width * (len(part) + 1) > SHORT_AREA
        ):
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _width(row: Row) -> int:
    """Slots that the row sees without a window, in whole buckets."""
    return -(-(row.end + len(row.scored)) // BUCKET) * BUCKET


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
