"""Attention of a pass in Triton: keys and values are read where they lie, none is gathered.

A program takes a tile of queries of one row, one key/value head and one share of the row's slots
(flash-decoding); a second kernel joins the shares. The query heads that share keys lie in one tile.

    slots of a row   [ text: 0 ................ end ) [ candidates )
    query number a     sees those of the text before a, and itself; a window cuts from the left

Texts and candidates follow the same rule, with a the index of the query among its row's slots.

Legend: as in attention.py; a tile has M lines, one for each query and query head, and N slots are
read at a time.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from value_server.engine.job import Row
from value_server.engine.memory import on_device
from value_server.engine.shares import Shares

FIELDS: tl.constexpr = tl.constexpr(5)  # of a tile, see `tiles_of`
LINES = (16, 64)  # M; no matrix unit takes fewer than 16
PROGRAMS = 512  # keep a large GPU busy; where there are fewer, the slots of a row are shared out
MOST_SHARES = 32
NO_WINDOW = 1 << 30
# N and stages, the fastest on an H100: of few lines, and of more
FEW, MANY = (128, 2), (64, 3)
WARPS = 4
SHARED = 227 << 10  # bytes, of an H100
UNSTAGED = 16 << 10  # of these, for all that is not staged


class Tiles:
    """All rows of a pass."""

    def __init__(self, table: Tensor, slots: Tensor, queries: int) -> None:
        """table (T, FIELDS) and slots, both int32 and on the device; queries: of a tile at most."""
        self.table, self.slots, self.queries = table, slots, queries

    @classmethod
    def of(cls, rows: Sequence[Row], per_key: int, device: torch.device) -> "Tiles":
        """per_key: G, or about what it is; it decides how large a tile is, nothing else."""
        shares = Shares.of(rows)
        queries = tile_queries(shares, per_key)
        table = tiles_of(shares, queries)
        packed = np.concatenate([table.reshape(-1), shares.slots])  # one way to the device
        there = on_device(packed, device)
        return cls(there[: table.size].view(-1, FIELDS.value), there[table.size :], queries)

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        scaling: float,
        window: int | None,
    ) -> None:
        """See attention.Rows."""
        heads, per_key, (width, wide) = (
            keys.shape[0],
            query.shape[0] // keys.shape[0],
            out.shape[1:],
        )
        count = len(self.table)
        shares = shares_of(count * heads)
        if query.stride(2) != 1:
            query = query.contiguous()
        lines = max(LINES[0], triton.next_power_of_2(self.queries * per_key))
        dim_block, wide_block = (max(16, triton.next_power_of_2(d)) for d in (query.shape[2], wide))
        staged = (dim_block + wide_block) * query.element_size()
        slots_block, stages = blocks_of(lines, staged, shared_bytes(query.device))
        part, lse = out, out
        if shares > 1:
            part = out.new_empty(shares, *out.shape, dtype=torch.float32)
            lse = out.new_empty(shares, *out.shape[:2], dtype=torch.float32)
        _attend[(count, heads, shares)](
            *(query, keys, values, part, lse, self.table, self.slots),
            *(scaling * 1.4426950408889634, window or NO_WINDOW, len(out), width),
            *(*query.stride()[:2], *keys.stride()[:2], *values.stride()[:2]),
            per_key=per_key,
            dim=query.shape[2],
            wide=wide,
            dim_block=dim_block,
            wide_block=wide_block,
            lines=lines,
            slots_block=slots_block,
            shares=shares,
            num_warps=WARPS,
            num_stages=stages,
        )
        if shares > 1:
            _join[(len(out), width)](
                *(part, lse, out, len(out), width),
                wide=wide,
                wide_block=triton.next_power_of_2(wide),
                shares=shares,
                num_warps=1,
            )


def tile_queries(shares: Shares, per_key: int) -> int:
    """How many queries of a row a tile takes: the longest row's, as far as the lines go."""
    lines = triton.next_power_of_2(per_key * int(shares.queries.max()))
    return max(1, min(max(lines, LINES[0]), LINES[1]) // per_key)


def tiles_of(shares: Shares, queries: int) -> NDArray[np.int32]:
    """(T, FIELDS): where the row's slots begin, a of the tile's first query, the text's end, the
    query's place in the pass, and how many queries the tile has."""
    begin, end, first, counts = shares.begin, shares.end, shares.first, shares.queries
    sizes = shares.sizes
    parts = -(-counts // queries)
    row = np.repeat(np.arange(len(counts)), parts)
    done = queries * (np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts))
    starts = np.cumsum(sizes) - sizes
    left = np.minimum(counts[row] - done, queries)
    table = np.stack([starts[row], begin[row] + done, end[row], first[row] + done, left], axis=1)
    return table.astype(np.int32)


@cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have."""
    if device.type != "cuda":
        return SHARED
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block))


def blocks_of(lines: int, slot_bytes: int, shared: int) -> tuple[int, int]:
    """N and stages. slot_bytes: of a slot's key and value; shared: bytes that there are."""
    room = (shared - UNSTAGED) // slot_bytes  # slots
    if lines == LINES[0] and FEW[0] * FEW[1] <= room:
        return FEW
    return MANY[0], max(1, min(MANY[1], room // MANY[0]))


def shares_of(programs: int) -> int:
    """A power of two, the same whatever the texts' lengths are."""
    return min(MOST_SHARES, triton.next_power_of_2(-(-PROGRAMS // programs)))


@triton.jit(do_not_specialize=["total"])
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, out, lse, tiles, slots, scale, window, total, width,
    query_head, query_step, keys_head, keys_step, values_head, values_step,
    per_key: tl.constexpr, dim: tl.constexpr, wide: tl.constexpr,
    dim_block: tl.constexpr, wide_block: tl.constexpr, lines: tl.constexpr,
    slots_block: tl.constexpr, shares: tl.constexpr,
):  # fmt: skip
    tile, head, share = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    start = tl.load(tiles + tile * FIELDS)
    begin = tl.load(tiles + tile * FIELDS + 1)
    end = tl.load(tiles + tile * FIELDS + 2)
    first = tl.load(tiles + tile * FIELDS + 3)
    count = tl.load(tiles + tile * FIELDS + 4)

    line = tl.arange(0, lines)
    number = line // per_key  # of the query in the tile
    real = number < count
    heads = head * per_key + line % per_key
    mine = begin + number  # a
    place = (first + number).to(tl.int64)
    d, e = tl.arange(0, dim_block), tl.arange(0, wide_block)
    at_query = query + heads[:, None] * query_head + place[:, None] * query_step + d[None, :]
    q = tl.load(at_query, mask=real[:, None] & (d < dim)[None, :], other=0.0)

    low = tl.maximum(0, tl.minimum(begin, end) - window + 1)
    span = begin + count - low
    size = tl.cdiv(tl.cdiv(span, slots_block), shares) * slots_block
    low += share * size
    high = tl.minimum(low + size, begin + count)

    top = tl.full((lines,), float("-inf"), tl.float32)
    total_weight = tl.zeros((lines,), tl.float32)
    acc = tl.zeros((lines, wide_block), tl.float32)
    for at in range(low, high, slots_block):
        n = at + tl.arange(0, slots_block)
        inside = n < high
        slot = tl.load(slots + start + n, mask=inside, other=0).to(tl.int64)
        at_keys = keys + head * keys_head + slot[None, :] * keys_step + d[:, None]
        k = tl.load(at_keys, mask=inside[None, :] & (d < dim)[:, None], other=0.0)
        at_values = values + head * values_head + slot[:, None] * values_step + e[None, :]
        v = tl.load(at_values, mask=inside[:, None] & (e < wide)[None, :], other=0.0)
        before = (n[None, :] < mine[:, None]) & (n < end)[None, :]
        near = tl.minimum(mine, end)[:, None] - n[None, :] < window
        seen = ((before & near) | (n[None, :] == mine[:, None])) & inside[None, :]
        score = tl.dot(q, k, input_precision="ieee") * scale
        score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen so far
        weight = tl.exp2(score - base[:, None])
        fade = tl.exp2(top - base)
        total_weight = total_weight * fade + tl.sum(weight, 1)
        acc = acc * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        top = new_top

    some = tl.where(total_weight == 0.0, 1.0, total_weight)
    where = (share * total + place) * width + heads
    at_out = out + where[:, None] * wide + e[None, :]
    result = (acc / some[:, None]).to(out.dtype.element_ty)
    tl.store(at_out, result, mask=real[:, None] & (e < wide)[None, :])
    if shares > 1:
        tl.store(lse + where, top + tl.log2(some), mask=real)


@triton.jit(do_not_specialize=["total"])
def _join(  # type: ignore[no-untyped-def]
    part, lse, out, total, width,
    wide: tl.constexpr, wide_block: tl.constexpr, shares: tl.constexpr,
):  # fmt: skip
    """The mean of the shares by their weights; one query and head."""
    where = tl.program_id(0).to(tl.int64) * width + tl.program_id(1)
    share, e = tl.arange(0, shares), tl.arange(0, wide_block)
    places = share.to(tl.int64) * total * width + where
    weight = tl.load(lse + places)
    weight = tl.exp2(weight - tl.max(weight, 0))
    there = part + places[:, None] * wide + e[None, :]
    parts = tl.load(there, mask=(e < wide)[None, :], other=0.0)
    joined = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + where * wide + e, joined.to(out.dtype.element_ty), mask=e < wide)
