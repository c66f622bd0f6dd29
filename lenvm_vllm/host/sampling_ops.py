"""vLLM's own cut and penalties, done by its own functions where the plugin has to do them."""

import torch
from torch import Tensor

from lenvm_vllm.host.names import apply_all_penalties, apply_top_k_top_p
from lenvm_vllm.host.sampling import OwnSampling


def cut_inplace(
    logits: Tensor, rows: list[int], temperatures: list[float], own: list[OwnSampling]
) -> None:
    """Cut `rows` of logits (batch, V) as vLLM would: min_p, then top_k, then top_p."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)

    x = logits[rows].float() / column(temperatures)[:, None]
    if any(o.min_p for o in own):
        least = x.amax(-1, keepdim=True) + column([o.min_p for o in own]).log()[:, None]
        x = x.masked_fill(x < least, -torch.inf)
    size = logits.shape[-1]
    top_k = column([min(o.top_k or size, size) for o in own]).int()
    top_p = column([o.top_p for o in own])
    x = apply_top_k_top_p(
        x,
        top_k if any(o.top_k for o in own) else None,
        top_p if any(o.top_p < 1 for o in own) else None,
    )
    logits[rows] = logits[rows].masked_fill(x.isneginf(), -torch.inf)


def penalise_inplace(
    logits: Tensor,
    rows: list[int],
    texts: list[tuple[list[int], list[int]]],
    own: list[OwnSampling],
) -> None:
    """Penalise `rows` of logits (batch, V) as vLLM would. texts: prompt and output of each row."""

    def column(name: str) -> Tensor:
        values = [getattr(o, name) for o in own]
        return torch.tensor(values, dtype=torch.float32, device=logits.device)

    size = logits.shape[-1]
    longest = max(len(prompt) for prompt, _ in texts)
    prompts = [[*prompt, *[size] * (longest - len(prompt))] for prompt, _ in texts]
    logits[rows] = apply_all_penalties(
        logits[rows],
        torch.tensor(prompts, dtype=torch.long, device=logits.device),
        column("presence_penalty"),
        column("frequency_penalty"),
        column("repetition_penalty"),
        [output for _, output in texts],
    )
