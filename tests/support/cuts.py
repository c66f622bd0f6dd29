"""Random logits and cuts, and the candidates of a row as a dict.

Legend: V vocabulary.
"""

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lenvm_vllm.steering.candidates import Candidates, Cut

V = 24
INF = math.inf


seeds = st.integers(0, 2**31)
cuts = st.builds(
    Cut,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 99]),
    top_p=st.sampled_from([0.2, 0.7, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    eos_ids=st.sampled_from([[], [0], [3, 7], [V - 1, V, 10 * V, -1]]),
)


def cut(**fields: Any) -> Cut:
    """A cut that cuts nothing; token 0 is the end."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "eos_ids": [0]}
    return Cut(**(values | fields))


def random_logits(rows: int, seed: int, blocked: float = 0.2) -> Tensor:
    """(rows, V) float32 without ties; a share of them at -inf, the ends among them."""
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, V, generator=rng)
    return logits.masked_fill(torch.rand(rows, V, generator=rng) < blocked, -INF)


def distribution(row: Tensor, temperature: float) -> Tensor:
    """(V,) float64: what vLLM samples from."""
    return torch.softmax(row.double() / temperature, dim=-1)


def row_of(candidates: Candidates, i: int) -> tuple[dict[int, float], float]:
    kept = candidates.kept[i]
    ids, q = candidates.ids[i][kept].tolist(), candidates.log_q[i][kept].exp().tolist()
    return dict(zip(ids, q, strict=True)), float(candidates.log_p0[i].exp())


def with_choice(candidates: Candidates) -> list[int]:
    """The rows that are worth scoring."""
    all_of_it = torch.ones(len(candidates.ids), dtype=torch.float64)
    return candidates.scored(all_of_it, all_of_it * V).any(-1).nonzero()[:, 0].tolist()
