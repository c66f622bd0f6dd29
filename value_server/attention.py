"""Attention of one flat pass over all sessions, as a function of transformers' attention interface.

The queries of a pass are new tokens of many sessions, one after the other: (1, heads, Q, D). Each
layer writes their keys and values into the pool first; then every row (the queries of one
session) reads the slots of its own text from it. Rows of similar shape are padded to a group and
go into one kernel call.

Legend: Q queries of the pass, R rows of a group, q queries of a row, S slots that a row sees,
Hkv key/value heads, G query heads per key/value head, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "lenvm_slots"
GROUP_AREA = 1 << 16  # slots that one kernel call gathers at most


class KVPool:
    """Keys and values per layer, (slots + 1, Hkv, D) each; made at a layer's first use.

    The last slot is the padding: it stays zero.
    """

    def __init__(self, slots: int) -> None:
        self.padding = slots
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's pool; `key` and `value` (1, Hkv, Q, D) tell its shape."""
        if index not in self._layers:
            self._layers[index] = (self._new(key), self._new(value))
        return self._layers[index]

    def _new(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.padding + 1, like.shape[1], like.shape[3])


@dataclass(frozen=True)
class Row:
    """Queries of one session in one pass.

    first: index of its first query in the pass.
    path: slots of the text up to the last token computed by this pass.
    new: how many of them, at the end, are queries.
    candidates: slots of candidates that are queries, after the `new`.
    """

    first: int
    path: np.ndarray
    new: int
    candidates: Sequence[int]

    @property
    def queries(self) -> int:
        return self.new + len(self.candidates)

    @property
    def slots(self) -> int:
        return len(self.path) + len(self.candidates)


@dataclass(frozen=True)
class Group:
    """Rows padded to one shape.

    queries: (R, q) indices into the pass; padding repeats query 0.
    real: (R, q) bool, not padding.
    slots: (R * S,) indices into the pool.
    mask: (R, q, S) bool, True where a query sees a slot.
    positions: (R, q) and (R, S), for sliding windows.
    """

    queries: Tensor
    real: Tensor
    slots: Tensor
    mask: Tensor
    query_positions: Tensor
    slot_positions: Tensor


@dataclass
class Pass:
    """What the attention function needs to know; handed through the model as a keyword."""

    pool: KVPool
    written: Tensor  # (Q,) slot of each query
    groups: list[Group]
    biases: dict[tuple[int, int | None, int], Tensor] = field(default_factory=dict)

    def bias(self, number: int, window: int | None, heads: int, dtype: torch.dtype) -> Tensor:
        """Additive mask (R, 1, heads * q, S) of group `number`, the same for all layers."""
        key = (number, window, heads)
        if key not in self.biases:
            group = self.groups[number]
            mask = group.mask
            if window is not None:
                gap = group.query_positions[:, :, None] - group.slot_positions[:, None, :]
                mask = mask & (gap < window)
            bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            bias.masked_fill_(~mask, float("-inf"))
            self.biases[key] = bias.repeat(1, heads, 1)[:, None]
        return self.biases[key]


def build_pass(pool: KVPool, rows: Sequence[Row], device: torch.device) -> Pass:
    """Group `rows` and put their indices on the device."""
    written = np.concatenate([_written(row) for row in rows])
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        # Powers of two: at most half of a group is padding in either direction.
        width = (row.slots - 1).bit_length()
        key = ((row.queries - 1).bit_length(), width)
        part = len(groups.get(key, ()))
        groups.setdefault((*key, (part << width) // GROUP_AREA), []).append(row)
    built = [_build_group(group, pool.padding, device) for group in groups.values()]
    return Pass(pool, torch.from_numpy(written).to(device), built)


def _written(row: Row) -> np.ndarray:
    new = row.path[len(row.path) - row.new :]
    return np.concatenate([new, np.asarray(row.candidates, dtype=np.int64)])


def _build_group(rows: Sequence[Row], padding: int, device: torch.device) -> Group:
    count, width, height = len(rows), max(r.slots for r in rows), max(r.queries for r in rows)
    queries = np.zeros((count, height), dtype=np.int64)
    real = np.zeros((count, height), dtype=bool)
    slots = np.full((count, width), padding, dtype=np.int64)
    mask = np.zeros((count, height, width), dtype=bool)
    mask[:, :, 0] = True  # no padded query sees nothing at all: that would be NaN
    query_positions = np.zeros((count, height), dtype=np.int64)
    slot_positions = np.zeros((count, width), dtype=np.int64)
    for i, row in enumerate(rows):
        n, end = row.queries, len(row.path)
        queries[i, :n] = np.arange(row.first, row.first + n)
        real[i, :n] = True
        slots[i, :end] = row.path
        slots[i, end : row.slots] = row.candidates
        #             path [0, end) | candidates [end, slots)
        # new token k:  causal      |  none
        # candidate c:  all         |  itself
        query_positions[i, : row.new] = np.arange(end - row.new, end)
        query_positions[i, row.new : n] = end
        slot_positions[i, : row.slots] = np.minimum(np.arange(row.slots), end)
        mask[i, :n, :end] = np.arange(end) <= query_positions[i, :n, None]
        mask[i, :n, end : row.slots] = np.eye(n, row.slots - end, -row.new, dtype=bool)
    arrays = (queries, real, slots.reshape(-1), mask, query_positions, slot_positions)
    return Group(*(torch.from_numpy(a).to(device) for a in arrays))


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
    keys, values = lenvm_pass.pool.layer(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    keys.index_copy_(0, lenvm_pass.written, key[0].transpose(0, 1))
    values.index_copy_(0, lenvm_pass.written, value[0].transpose(0, 1))
    per_key = query.shape[1] // key.shape[1]
    out = query.new_zeros(query.shape[2], query.shape[1], value.shape[3])
    for number, group in enumerate(lenvm_pass.groups):
        rows, height = group.queries.shape
        # The G heads that share keys become G * q queries of one head: nothing is repeated.
        q = query[0].transpose(0, 1)[group.queries]  # (R, q, Hkv * G, D)
        q = q.unflatten(2, (-1, per_key)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (R, Hkv, G*q, D)
        k = keys.index_select(0, group.slots).unflatten(0, (rows, -1)).transpose(1, 2)
        v = values.index_select(0, group.slots).unflatten(0, (rows, -1)).transpose(1, 2)
        bias = lenvm_pass.bias(number, sliding_window, per_key, q.dtype)
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling)
        o = o.unflatten(2, (per_key, height)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        out[group.queries[group.real]] = o[group.real]  # (queries, Hkv * G, D)
    return out[None], None


def register() -> None:
    """Make the attention known to transformers. No mask function goes with it: none is built."""
    AttentionInterface.register(NAME, slot_attention)
