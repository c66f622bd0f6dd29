"""What the API server is told of each step of a guided text."""

import math

import torch
from torch import Tensor

from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.steering.candidates import eos_index
from lenvm_vllm.telemetry.progress import FORCED, GAVE_WAY, LANDING, UNSEEN, VALUED, Progress

_FIRST = 8192  # tokens that are looked at first: in most vocabularies the likeliest come first
_NEVER = -15.0  # nats; less likely ends are told as 0, since clients are told six digits


def end_probabilities(logits: Tensor, states: dict[int, RequestState]) -> list[float]:
    """The unguided model's probability of the end in each row, NaN where no end is allowed.

    logits: (batch, V), not changed.
    """
    ends = {row: s.ends for row, s in states.items() if not s.held}
    rows = _likely_to_end(logits, ends) if logits.device.type == "cpu" else list(ends)
    found = dict.fromkeys(ends, 0.0)
    if rows:
        index, ids = eos_index([ends[row] for row in rows], logits.shape[-1])
        at = torch.tensor(rows)[index].to(logits.device), ids.to(logits.device)
        log_p = logits[at].double() - _totals(logits, rows).double()[index.to(logits.device)]
        known = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, index, log_p.exp().cpu())
        found |= dict(zip(rows, known.tolist(), strict=True))
    return [found.get(row, math.nan) for row in states]


def _totals(logits: Tensor, rows: list[int]) -> Tensor:
    """(B,) logsumexp of `rows`. On a CPU one by one, which is several times as fast: a row and all
    that is made of it fit into its cache."""
    if logits.device.type == "cpu":
        return torch.stack([logits[row].logsumexp(-1) for row in rows])
    return logits[rows].logsumexp(-1)


def _likely_to_end(logits: Tensor, ends: dict[int, list[int]]) -> list[int]:
    """Rows in which an end may have more than e^_NEVER: the sum over a vocabulary is the most that
    a step computes on a CPU."""
    if not ends:
        return []
    index, ids = eos_index(list(ends.values()), logits.shape[-1])
    rows, first = torch.tensor(list(ends)), min(ends)
    others = logits[first : max(ends) + 1, :_FIRST].amax(-1)[rows - first]
    likely = ~(logits[rows[index], ids] - others[index] < _NEVER)  # also of what is no number
    found: list[int] = rows[index[likely]].unique().tolist()
    return found


def tell(
    progress: Progress, states: dict[int, RequestState], ended: set[int], p_end: list[float]
) -> None:
    """ended: rows that a rail ends. p_end: as of `end_probabilities`, of the same states."""
    told, forced = list(states.values()), [s.forced or row in ended for row, s in states.items()]
    for state in told:
        state.steps += 1
    progress.tell(
        rows=[s.row for s in told if s.row is not None],
        index=[len(s.output_ids) for s in told],
        counted=[s.generated + 1 for s in told],
        token=[s.output_ids[-1] if s.output_ids else -1 for s in told],
        p_end=p_end,
        expected=[0.0 if f else s.expected for s, f in zip(told, forced, strict=True)],
        flags=[
            FORCED * f
            | LANDING * s.landing
            | VALUED * bool(s.valued)
            | GAVE_WAY * s.gave_way
            | UNSEEN * s.unseen
            for s, f in zip(told, forced, strict=True)
        ],
        steps=[s.steps for s in told],
        steered=[s.steered for s in told],
    )
