"""The lookahead head: the values after all next tokens, from one row.

Legend: H hidden size, V tokens, r rank. z(x) = b(h) + q(h).k(e_x), with h the hidden state after
the text's last token, and e_x the input embedding of a next token x.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu


class Lookahead(nn.Module):
    """Always in float32, as the value head."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.fc = nn.Linear(hidden_size, hidden_size, dtype=torch.float32)
        self.queries = nn.Linear(hidden_size, 1 + rank, dtype=torch.float32)
        self.token_fc = nn.Linear(hidden_size, hidden_size, dtype=torch.float32)
        self.token_keys = nn.Linear(hidden_size, rank, dtype=torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) of any dtype -> (..., 1 + r) float32, b and q."""
        with torch.autocast(hidden.device.type, enabled=False):
            out: Tensor = self.queries(silu(self.fc(hidden.float())))
            return out

    def keys(self, embeddings: Tensor) -> Tensor:
        """(..., H) input embeddings of any dtype -> (..., r) float32 k."""
        with torch.autocast(embeddings.device.type, enabled=False):
            e = rms_norm(embeddings.float(), embeddings.shape[-1:])
            out: Tensor = self.token_keys(e + silu(self.token_fc(e)))
            return out


def logits_after(queries: Tensor, keys: Tensor) -> Tensor:
    """(..., 1 + r) and (..., K, r) -> (..., K) z after each of K next tokens."""
    products = (keys @ queries[..., 1:, None])[..., 0]
    return queries[..., :1] + products
