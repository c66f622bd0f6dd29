"""Attention of one flat pass over all sessions, as a function of transformers' attention interface.

The queries of a pass are new tokens and candidates of many sessions, one session's row after the
other: (1, heads, Q, D). Each layer writes their keys and values into the pool first; then every
row reads the slots of its own text from it. Long rows, and all rows on a GPU, are padded to
groups of one kernel call each (groups.py); a short row on a CPU is cheaper alone (alone.py).

Legend: Q queries of the pass, n queries of a row, S slots that a row sees, Hkv key/value heads,
G query heads per key/value head, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface

NAME = "lenvm_slots"


class KVPool:
    """Keys and values per layer, (Hkv, slots + 1, D) each; made at a layer's first use.

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
        return like.new_zeros(like.shape[1], self.padding + 1, like.shape[3])

    @property
    def bytes_per_slot(self) -> int:
        """Over all layers that were used."""
        pools = [pool for layer in self._layers.values() for pool in layer]
        return sum(p.element_size() * p.shape[0] * p.shape[2] for p in pools)


@dataclass(frozen=True)
class Row:
    """Queries of one session in one pass.

    first: index of its first query in the pass.
    path: slots of the text up to the last token computed by this pass.
    new: how many of them, at the end, are queries.
    candidates: slots of candidates that are queries, after the `new`.
    """

    first: int
    path: NDArray[np.int64]
    new: int
    candidates: NDArray[np.int64]

    @property
    def queries(self) -> int:
        return self.new + len(self.candidates)

    @property
    def written(self) -> NDArray[np.int64]:
        """(n,) slot of each query."""
        return np.concatenate([self.path[len(self.path) - self.new :], self.candidates])

    def mask(self, first_slot: int = 0, window: int | None = None) -> NDArray[np.bool_]:
        """(n, S): which query sees which slot of path[first_slot:] and the candidates.

        path [0, end) | candidates: a new token sees the path up to itself, a candidate all of
        the path and itself. window: tokens that a layer looks back at most, itself included.
        """
        end = len(self.path)
        position = np.minimum(np.arange(end - self.new, end - self.new + self.queries), end)
        gap = position[:, None] - np.arange(first_slot, end)
        seen = (gap >= 0) if window is None else (gap >= 0) & (gap < window)
        own = np.eye(self.queries, len(self.candidates), -self.new, dtype=bool)
        return np.concatenate([seen, own], axis=1)


class Part(Protocol):
    """Rows of a pass that are computed together."""

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


@dataclass(frozen=True)
class Pass:
    """What the attention function needs to know; handed through the model as a keyword."""

    pool: KVPool
    written: Tensor  # (Q,) slot of each query
    parts: Sequence[Part]


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
    keys.index_copy_(1, lenvm_pass.written, key[0])
    values.index_copy_(1, lenvm_pass.written, value[0])
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    for part in lenvm_pass.parts:
        part.attend(query[0], keys, values, out, scale, sliding_window)
    return out[None], None


def register() -> None:
    """Make the attention known to transformers. No mask function goes with it: none is built."""
    AttentionInterface.register(NAME, slot_attention)
