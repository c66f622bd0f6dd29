"""The largest logits of each row of a batch.

Legend: V vocabulary, B rows, K logits of each.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lenvm_vllm.steering.devices import uploaded

_BLOCK = 64  # tokens of which only the likeliest is looked at first
_STEP = 16  # numbers of logits are rounded up to a multiple of it, so that rows go together


def largest(
    logits: Tensor, rows: Sequence[int], counts: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """(B, K) the largest logits of each row, `counts` (B,) of them at least, and their tokens; -inf
    behind them.

    The largest n of a row are in the n blocks with the largest maxima, or in the rest behind the
    blocks: so most of the vocabulary is read once, and never sorted.
    """
    size = logits.shape[-1]
    counts = np.minimum(-(-counts // _STEP) * _STEP, size)
    whole = size // _BLOCK * _BLOCK
    blocks = logits[:, :whole].unflatten(1, (-1, _BLOCK))
    kinds = np.unique(counts).tolist()
    groups = [torch.from_numpy(np.flatnonzero(counts == count)) for count in kinds]
    index, *groups = uploaded(logits.device, torch.tensor(rows), *groups)
    first = min(rows)
    peaks = blocks[first : max(rows) + 1].amax(-1)  # without a copy, which costs more
    most = int(counts.max())
    top = logits.new_full((len(rows), most), -torch.inf)
    ids = index.new_zeros((len(rows), most))
    for count, group in zip(kinds, groups, strict=True):
        own = index[group]
        at = peaks[own - first].topk(min(count, peaks.shape[-1])).indices
        few = _of_blocks(logits, blocks, own, at)
        if whole < size:
            few = torch.cat([few, logits[own, whole:]], dim=-1)
        top[group, :count], place = few.topk(count)
        at = torch.cat([at, torch.full_like(own[:, None], blocks.shape[1])], dim=-1)
        ids[group, :count] = at.gather(1, place // _BLOCK) * _BLOCK + place % _BLOCK
    return top, ids


def _of_blocks(logits: Tensor, blocks: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """(B, N * _BLOCK) the blocks `at` (B, N) of each of `rows` (B,). blocks: view of `logits`."""
    stride, one = logits.stride()
    if stride % _BLOCK or one != 1:
        return blocks[rows[:, None], at].flatten(1)
    # As rows of one table, which is several times as fast.
    count = (len(logits) - 1) * (stride // _BLOCK) + blocks.shape[1]
    table = logits.as_strided((count, _BLOCK), (_BLOCK, 1))
    places = (rows[:, None] * (stride // _BLOCK) + at).flatten()
    return table.index_select(0, places).view(len(rows), at.shape[1] * _BLOCK)
