"""vLLM's own cut and penalties, done by its own functions where the plugin has to do them.

Loaded in the engine only, and at its start: a name that a newer vLLM has moved keeps the engine
from starting, where later it would end one that serves.
"""

import torch
from torch import Tensor

from lenvm_vllm.host.names import apply_all_penalties, apply_top_k_top_p
from lenvm_vllm.host.sampling import OwnSampling


def cut_inplace(
    logits: Tensor, rows: list[int], temperatures: list[float], own: list[OwnSampling]
) -> None:
    """Cut `rows` of logits (batch, V) as vLLM would: min_p, then top_k, then top_p."""
    if not rows:
        return
    size = logits.shape[-1]
    temperature = torch.tensor(temperatures, dtype=torch.float32, device=logits.device)
    x = logits[rows].float() / temperature[:, None]
    if any(o.min_p for o in own):
        least = x.amax(-1, keepdim=True) + _column(own, "min_p", x).log()[:, None]
        x = x.masked_fill(x < least, -torch.inf)
    top_k = _column(own, "top_k", x)
    top_k = top_k.masked_fill(top_k == 0, size).clamp(max=size).int()
    x = apply_top_k_top_p(
        x,
        top_k if any(o.top_k for o in own) else None,
        _column(own, "top_p", x) if any(o.top_p < 1 for o in own) else None,
    )
    logits[rows] = logits[rows].masked_fill(x.isneginf(), -torch.inf)


def penalise_inplace(
    logits: Tensor,
    rows: list[int],
    texts: list[tuple[list[int], list[int]]],
    own: list[OwnSampling],
) -> None:
    """Penalise `rows` of logits (batch, V) as vLLM would. texts: prompt and output of each row."""
    if not rows:
        return
    size = logits.shape[-1]
    longest = max(len(prompt) for prompt, _ in texts)
    prompts = [[*prompt, *[size] * (longest - len(prompt))] for prompt, _ in texts]
    logits[rows] = apply_all_penalties(
        logits[rows],
        torch.tensor(prompts, dtype=torch.long, device=logits.device),
        _column(own, "presence_penalty", logits),
        _column(own, "frequency_penalty", logits),
        _column(own, "repetition_penalty", logits),
        [output for _, output in texts],
    )


def _column(own: list[OwnSampling], name: str, like: Tensor) -> Tensor:
    """(B,) float32 a number of each, on the device of `like`."""
    values = [getattr(o, name) for o in own]
    return torch.tensor(values, dtype=torch.float32, device=like.device)
