"""What the API server is told of each step of a guided text."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.steering.candidates import eos_index
from lenvm_vllm.steering.devices import Fetched, uploaded
from lenvm_vllm.telemetry.progress import FORCED, GAVE_WAY, LANDING, UNSEEN, VALUED, Progress

_FIRST = 8192  # tokens that are looked at first: in most vocabularies the likeliest come first
_NEVER = -15.0  # nats; less likely ends are told as 0, since clients are told six digits


@dataclass(frozen=True)
class EndProbabilities:
    """The unguided model's probability of the end in each of `rows`; the steering of the step goes
    on beside them.

    ends: tokens of the end in each row where one is allowed. likely: those of them that are looked
    at. ended: (M,) the probability of each of their ends, which stands in place `index` (M,) of
    `likely`.
    """

    rows: list[int]
    ends: dict[int, list[int]]
    likely: list[int]
    index: Tensor
    ended: Fetched | None

    def here(self) -> list[float]:
        """Of each of `rows`, NaN where no end is allowed. Waits until they are known."""
        found = dict.fromkeys(self.ends, 0.0)
        if self.ended is not None:
            known = torch.zeros(len(self.likely), dtype=torch.float64)
            known.index_add_(0, self.index, self.ended.here())
            found |= dict(zip(self.likely, known.tolist(), strict=True))
        return [found.get(row, math.nan) for row in self.rows]


def end_probabilities(logits: Tensor, states: dict[int, RequestState]) -> EndProbabilities:
    """Those of `states`. logits: (batch, V), as they are now, and not changed."""
    ends = {row: s.ends for row, s in states.items() if not s.held}
    rows = _likely_to_end(logits, ends) if logits.device.type == "cpu" else list(ends)
    index, ids = eos_index([ends[row] for row in rows], logits.shape[-1])
    ended = None
    if rows:
        at, place, token = uploaded(logits.device, torch.tensor(rows), index, ids)
        log_p = logits[at[place], token].double() - _totals(logits, at).double()[place]
        ended = Fetched(log_p.exp())
    return EndProbabilities(list(states), ends, rows, index, ended)


def _totals(logits: Tensor, rows: Tensor) -> Tensor:
    """(B,) logsumexp of `rows` (B,). On a CPU one by one, which is several times as fast: a row
    and all that is made of it fit into its cache."""
    if logits.device.type == "cpu":
        return torch.stack([logits[row].logsumexp(-1) for row in rows.tolist()])
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
    progress: Progress, states: dict[int, RequestState], ended: set[int], p_end: EndProbabilities
) -> None:
    """ended: rows that a rail ends. p_end: as of `end_probabilities`, of the same states."""
    told, forced = list(states.values()), [s.forced or row in ended for row, s in states.items()]
    progress.tell(
        rows=[s.row for s in told if s.row is not None],
        index=[len(s.output_ids) for s in told],
        counted=[s.generated + 1 for s in told],
        token=[s.output_ids[-1] if s.output_ids else -1 for s in told],
        p_end=p_end.here(),
        expected=[0.0 if f else s.expected for s, f in zip(told, forced, strict=True)],
        flags=[
            FORCED * f
            | LANDING * s.landing
            | VALUED * bool(s.valued)
            | GAVE_WAY * s.gave_way
            | UNSEEN * s.unseen
            for s, f in zip(told, forced, strict=True)
        ],
        steps=[s.generated + 1 - s.target.prefix_tokens for s in told],
        steered=[s.steered for s in told],
    )
