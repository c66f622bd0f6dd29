"""Values after candidates, each candidate forwarded behind its text.

Legend: B texts, T tokens of the longest, N positions of a text, K candidates, L = T + N·K of the
longest. A text and all its candidates are one row: a candidate sees the text as far as its
position, and itself.

    row          t0 t1 t2 t3 | a b | c d        a, b behind t1; c, d behind t2
    positions     0  1  2  3 | 2 2 | 3 3
    sees as far   0  1  2  3 | 1 1 | 2 2        and itself
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from value_server.model.value_model import ValueModel

Ids = NDArray[np.int64]


def check_branches(model: ValueModel) -> None:
    """Raises ValueError where a mask cannot tell candidates apart."""
    kinds = {*(getattr(model.config, "layer_types", None) or ["full_attention"])}
    if kinds != {"full_attention"} or getattr(model.config, "use_sliding_window", False):
        raise ValueError(
            f"teacher: layers of {model.config.model_type!r} are {sorted(kinds)}, must be "
            "full_attention"
        )
    if model.lenvm.pictures:
        raise ValueError("teacher: sees pictures, must be one of text alone")


@torch.inference_mode()
def exact_logits(
    model: ValueModel, texts: Sequence[Ids], positions: Sequence[Ids], ids: Sequence[Tensor]
) -> list[Tensor]:
    """(N, K) float32 logits z behind the text up to each position and one candidate; on the CPU.

    texts: (T,); positions: (N,); ids: (N, K); all texts in one pass.
    """
    device = next(model.parameters()).device
    rows = [_row(*own) for own in zip(texts, positions, ids, strict=True)]
    tokens, places, sight = (
        pad_sequence([*part], batch_first=True) for part in zip(*rows, strict=True)
    )
    # (B, 1, L, L); padding sees the first token and itself.
    own = torch.arange(tokens.shape[1], device=device)
    mask = (own <= sight.to(device)[:, :, None]) | (own == own[:, None])
    z = model(tokens.to(device), places.to(device), mask[:, None]).cpu()
    return [
        z[row, len(text) : len(text) + of_text.numel()].view(of_text.shape)
        for row, (text, of_text) in enumerate(zip(texts, ids, strict=True))
    ]


def _row(text: Ids, positions: Ids, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(L,) tokens, positions, and how far each sees."""
    at = torch.from_numpy(positions).repeat_interleave(ids.shape[1])
    own = torch.arange(len(text))
    tokens = torch.cat([torch.from_numpy(text), ids.flatten()])
    return tokens, torch.cat([own, at + 1]), torch.cat([own, at])
