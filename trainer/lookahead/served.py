"""What the served model would put next.

Legend: B texts, T tokens, N positions of a text, K candidates, V tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

Ids = NDArray[np.int64]


class ServedModel:
    """A causal language model at T = 1. Raises ValueError if `source` holds none."""

    def __init__(self, source: str, dtype: torch.dtype, device: torch.device) -> None:
        try:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ValueError(f"model: {source!r} does not load: {error}") from error
        self.model: PreTrainedModel = model.to(device).eval()
        self.ends = torch.tensor(end_ids(model), dtype=torch.int64, device=device)

    @torch.inference_mode()
    def candidates(
        self, texts: Sequence[Ids], positions: Sequence[Ids], number: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each text ids and probabilities (N, K) of its likeliest next tokens behind each of
        (N,) positions, on the CPU. No candidate ends the text."""
        rows = pad_sequence([torch.from_numpy(text) for text in texts], batch_first=True)
        kept = np.unique(np.concatenate(positions))  # of any text; what is padded comes after
        keep = torch.from_numpy(kept).to(self.model.device)
        logits = self.model(rows.to(self.model.device), logits_to_keep=keep, use_cache=False).logits
        found = []
        for own, at in zip(logits, positions, strict=True):
            p = own[torch.from_numpy(np.searchsorted(kept, at)).to(own.device)].float().softmax(-1)
            p[:, self.ends] = 0
            top, ids = p.topk(number)
            found.append((ids.cpu(), top.cpu()))
        return found


def end_ids(model: PreTrainedModel) -> list[int]:
    """Tokens that end a text."""
    given = (model.config.eos_token_id, getattr(model.generation_config, "eos_token_id", None))
    ends = [own if isinstance(own, list) else [own] for own in given if own is not None]
    return sorted({token for own in ends for token in own})
