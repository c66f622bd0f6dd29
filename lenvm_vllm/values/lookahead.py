"""What a lookahead head tells: the value logits after any next token, by one query of a text.

Legend: B texts, K tokens after each, V vocabulary, r rank.
"""

import numpy as np
import torch
from torch import Tensor

from value_server.contract import wire


class Keys:
    """k of all tokens of a checkpoint, which its server tells once."""

    def __init__(self, told: wire.LookaheadKeys) -> None:
        """told: checked, as of `wire.decode_keys`."""
        self.model_id, self.rank = told.model_id, told.rank
        keys = wire.unpack_keys(told.keys, told.rank)
        self._keys = torch.from_numpy(keys.astype(np.float16))  # (V, r), a copy to be its owner

    def after(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """(B, K) float32 logits z = b + q.k of `tokens` (B, K); NaN where the query is.

        queries: (B, 1 + r) float32, b and q of each text.
        """
        found = self._keys[tokens].float()  # (B, K, r)
        return torch.baddbmm(queries[:, :1, None], found, queries[:, 1:, None])[..., 0]
