"""What a lookahead head tells: the value logits after any next token, by one query of a text.

Legend: B texts, K tokens after each, V vocabulary, r rank.
"""

import numpy as np
import torch
from torch import Tensor

from value_server.contract import wire


class Keys:
    """k of all tokens of a checkpoint, which its server tells once."""

    def __init__(self, told: wire.LookaheadKeys, info: wire.ModelInfo) -> None:
        """info: of the model whose keys they should be. Raises WireError naming what is wrong."""
        self.model_id, self.rank = info.model_id, info.lookahead_rank
        rank, size = self.rank, info.vocab_size
        if told.version != wire.WIRE_VERSION:
            raise wire.WireError(f"got {told.version}, not {wire.WIRE_VERSION}", "version")
        if told.model_id != self.model_id:
            raise wire.WireError(f"of {told.model_id!r}, not of {self.model_id!r}", "model_id")
        if told.rank != rank:
            raise wire.WireError(f"got {told.rank}, the model has {rank}", "rank")
        if len(told.keys) != largest_keys(info):
            raise wire.WireError(f"{len(told.keys)} bytes for {size} keys of rank {rank}", "keys")
        keys = wire.unpack_keys(told.keys, rank).astype(np.float16)  # a copy that can be written
        if not np.isfinite(keys).all():
            raise wire.WireError("one is not a finite number", "keys")
        self._keys = torch.from_numpy(keys)  # (V, r)

    def after(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """(B, K) float32 logits z = b + q.k of `tokens` (B, K); NaN where the query is.

        queries: (B, 1 + r) float32, b and q of each text.
        """
        found = self._keys[tokens].float()  # (B, K, r)
        return torch.baddbmm(queries[:, :1, None], found, queries[:, 1:, None])[..., 0]


def largest_keys(info: wire.ModelInfo) -> int:
    """Bytes of all keys."""
    return 2 * info.vocab_size * info.lookahead_rank
