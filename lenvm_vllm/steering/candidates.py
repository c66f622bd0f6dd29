"""The candidate cut of a step, and the way back from a steered distribution to logits.

Legend: V vocabulary, B guided rows, K candidates, M written entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from lenvm_vllm.steering.devices import Fetched, uploaded
from lenvm_vllm.steering.largest import largest
from lenvm_vllm.steering.policies import log1mexp

_Columns = dict[str, Tensor]  # (B, 1) float64 of each number of a cut


@dataclass(frozen=True)
class Cut:
    """Per row: its own temperature and candidate limits, and the tokens that end its text.

    top_k 0 means no limit of that kind. end_top_k, end_top_p: limits within which an end may also
    be brought about; by default it may only within those within which it comes by itself.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    eos_ids: list[int]
    end_top_k: int = 0
    end_top_p: float = 0.0

    # A request has one for as long as it lives.

    @cached_property
    def numbers(self) -> list[float]:
        return [float(getattr(self, name)) for name in _NUMBERS]

    @cached_property
    def ends(self) -> list[int]:
        """`eos_ids`, each once and in order."""
        return sorted({*self.eos_ids})

    @cached_property
    def limit(self) -> int:
        """Candidates at most; 0: no limit."""
        return max(self.top_k, self.end_top_k)


_NUMBERS = ("temperature", "top_k", "top_p", "min_p", "end_top_k", "end_top_p")


@dataclass(frozen=True)
class Candidates:
    """The model's distribution over the candidates, float64 on the CPU.

    ids: (B, K) tokens that do not end the text, most probable first.
    log_q: (B, K) their log-probabilities among the `own` of them, -inf where cut.
    log_p0: (B,) log-probability of the end, -inf where it cannot even be brought about.
    log_rest: (B,) log(1 - p0), exact where p0 rounds to 1.
    own_end: (B,) bool, whether the end is inside the request's own cut; one that is not comes
        only where it is brought about.
    own: (B, K) bool, the same of the candidates.
    """

    ids: Tensor
    log_q: Tensor
    log_p0: Tensor
    log_rest: Tensor
    own_end: Tensor
    own: Tensor

    @property
    def kept(self) -> Tensor:
        """(B, K) bool."""
        return ~self.log_q.isneginf()

    def pick(self, rows: Tensor) -> "Candidates":
        """Those of some rows, by their numbers or a mask."""
        return Candidates(*(getattr(self, part.name)[rows] for part in fields(self)))

    def entropy(self) -> Tensor:
        """(B,) nats, of all candidates and the end together."""
        log_p0 = self.log_p0.masked_fill(~self.own_end, -torch.inf)
        log_rest = self.log_rest.masked_fill(~self.own_end, 0)
        log_q = self.log_q.masked_fill(~self.own, -torch.inf)
        log_p = torch.cat([log_p0[:, None], log_q + log_rest[:, None]], dim=-1)
        return torch.special.entr(log_p.exp()).sum(-1)

    def scored(self, mass: Tensor, most: Tensor) -> Tensor:
        """(B, K) bool: the most probable candidates that together have `mass` (B,) of q, `most`
        (B,) of them at most.

        None of a row where they and the end leave no choice.
        """
        q = self.log_q.exp()
        likely = self.kept & (q.cumsum(-1) - q < _limit(mass)[:, None])
        likely &= torch.arange(q.shape[-1]) < most[:, None]
        brought = (self.kept & ~self.own).any(-1)
        choice = likely.sum(-1) + ~self.log_p0.isneginf() + brought > 1
        return likely & choice[:, None]


@dataclass(frozen=True)
class Writes:
    """Changes to the logits, on the CPU: row `rows[i]`, token `ids[i]` gets `deltas[i]` added;
    every other token of those rows becomes -inf."""

    rows: Tensor
    ids: Tensor
    deltas: Tensor

    @staticmethod
    def together(parts: "Sequence[Writes]") -> "Writes":
        """Of different rows."""
        columns = zip(*((part.rows, part.ids, part.deltas) for part in parts), strict=True)
        return Writes(*map(torch.cat, columns))

    def apply_inplace(self, logits: Tensor) -> None:
        """logits: (batch, V)."""
        parts = self.rows, self.ids, self.deltas, self.rows.unique()
        rows, ids, deltas, steered = uploaded(logits.device, *parts)
        kept = logits[rows, ids] + deltas.to(logits.dtype)
        if logits.device.type == "cpu":  # row by row, which is twice as fast
            for row in steered.tolist():
                logits[row] = -torch.inf
        else:
            logits[steered] = -torch.inf
        logits[rows, ids] = kept


def eos_index(eos: Sequence[Sequence[int]], size: int) -> tuple[Tensor, Tensor]:
    """(M,) row and (M,) token of every end token in the vocabulary of every row."""
    rows = np.repeat(np.arange(len(eos)), np.fromiter(map(len, eos), np.int64, len(eos)))
    ids = np.fromiter(chain.from_iterable(eos), np.int64, len(rows))
    known = (ids >= 0) & (ids < size)
    return torch.from_numpy(rows[known]), torch.from_numpy(ids[known])


def cut_candidates(
    logits: Tensor, cuts: Sequence[Cut], width: int, rows: Sequence[int] | None = None
) -> Candidates:
    """Cut each row as its request says, the end apart from the rest.

    logits: (batch, V), after it as before. rows: B of them; None: all. width: K at most. A token at
    -inf is never a candidate. The end counts against no limit of the others, so an end that must
    not come leaves them.
    """
    size, device = logits.shape[-1], logits.device
    rows = range(len(logits)) if rows is None else rows
    columns = _columns(cuts)
    widths = np.minimum([cut.limit or width for cut in cuts], min(width, size))
    row, token = eos_index([cut.ends for cut in cuts], size)
    place = torch.arange(len(row)) - torch.searchsorted(row, row)
    most_ends = 1 + max(place.tolist(), default=0)
    far = [i for i, cut in enumerate(cuts) if cut.top_p < 1 and not cut.top_k]
    whole = torch.tensor(far, dtype=torch.long)
    parts = torch.tensor(rows), columns["temperature"], row, token, place, whole
    index, exact, row, token, place, whole = uploaded(device, *parts)
    temperature = exact.float()
    ends = temperature.new_full((len(rows), most_ends), -torch.inf)
    own = logits[index[row], token]
    ends[row, place] = own.float()

    full = torch.full_like(temperature, torch.nan)
    logits[index[row], token] = -torch.inf  # for a while: a copy without them would cost more
    try:
        top, ids = largest(logits, rows, widths)
        if len(whole):
            x = logits[index[whole]].float() / temperature[whole]
            full[whole] = x.logsumexp(-1, keepdim=True)
    finally:
        logits[index[row], token] = own
    top, ends = top.float() / temperature, ends / temperature

    # One copy from the device; float32 holds every id below 2^24.
    end = ends.logsumexp(-1, keepdim=True)
    here = torch.cat([top, ids.float(), end, full], dim=-1).double()
    here = Fetched(here).here()
    top, ids, end, full = here.split([top.shape[-1], top.shape[-1], 1, 1], dim=-1)
    most = int(widths.max())
    top, ids = top[:, :most], ids[:, :most].long()
    top = top.masked_fill(torch.arange(most) >= torch.from_numpy(widths)[:, None], -torch.inf)
    return _cut(top, ids, end, full, columns)


def _columns(cuts: Sequence[Cut]) -> _Columns:
    numbers = torch.from_numpy(np.array([cut.numbers for cut in cuts]))
    return dict(zip(_NUMBERS, numbers.T[:, :, None], strict=True))


def _cut(top: Tensor, ids: Tensor, end: Tensor, full: Tensor, cuts: _Columns) -> Candidates:
    """top, ids: (B, K) logits over temperature, sorted. end, full: (B, 1) logsumexp of the ends
    and of all other tokens, the latter NaN where only the top ones count."""
    top_k, top_p, log_min_p = cuts["top_k"], cuts["top_p"], cuts["min_p"].log()
    own_end = _end_fits(top, end, full, top_k, top_p)
    own_end &= end >= log_min_p + torch.maximum(top[:, :1], end)
    wider = _end_fits(top, end, full, cuts["end_top_k"], cuts["end_top_p"])

    top, total = _first(top, full, top_k)
    before = (top - total).exp().cumsum(-1) - (top - total).exp()
    cut = (before >= _limit(top_p)) | (top < log_min_p + top[:, :1])
    top = top.masked_fill(cut, -torch.inf)
    rest = top.logsumexp(-1, keepdim=True)
    end = end.masked_fill(~(own_end | wider), -torch.inf)
    both = torch.logaddexp(rest, end)
    log_q = torch.where(top.isneginf(), -torch.inf, top - rest)
    most = max(1, int((~cut).sum(-1).max()))
    ids, log_q = ids[:, :most], log_q[:, :most]
    ends = (end - both)[:, 0], (rest - both)[:, 0], own_end[:, 0]
    return Candidates(ids, log_q, *ends, own=~log_q.isneginf())


def _end_fits(top: Tensor, end: Tensor, full: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """(B, 1) bool: whether the end is inside these limits, in one line with the others: how many,
    and how much, comes before it.

    top_k, top_p: (B, 1); the others as of `_cut`.
    """
    top, total = _first(top, full, top_k)
    ahead = top > end
    few = (top_k == 0) | (ahead.sum(-1, keepdim=True) < top_k)
    before = torch.where(ahead, (top - torch.logaddexp(total, end)).exp(), 0.0)
    return few & (before.sum(-1, keepdim=True) < _limit(top_p)) & ~end.isneginf()


def _first(top: Tensor, full: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) the first `top_k` of `top`, and (B, 1) logsumexp of all that count."""
    rank = torch.arange(top.shape[-1])[None]
    top = top.masked_fill((top_k > 0) & (rank >= top_k), -torch.inf)
    return top, torch.where(full.isnan(), top.logsumexp(-1, keepdim=True), full)


def _limit(mass: Tensor) -> Tensor:
    """A share of 1 is no limit, whatever a sum rounds to."""
    return mass.masked_fill(mass >= 1, torch.inf)


def plan_writes(
    rows: list[int], cuts: list[Cut], before: Candidates, log_q: Tensor, log_p0: Tensor, size: int
) -> Writes:
    """Turn steered (log_q, log_p0) of `rows` into changes of their logits.

    vLLM divides by the temperature afterwards, so a log-ratio is written times T. Adding to
    the model's own logits, and not replacing them, leaves penalties what they were.
    """
    temperature = _columns(cuts)["temperature"]
    index = torch.tensor(rows)
    # (B, K): log of p'(x) / p(x)
    ratio = log_q + log1mexp(log_p0)[:, None] - before.log_q - before.log_rest[:, None]
    row, column = (before.kept & ratio.isfinite()).nonzero(as_tuple=True)
    end_row, end_id = eos_index([cut.eos_ids for cut in cuts], size)
    end_ratio = log_p0 - before.log_p0
    stays = end_ratio.isfinite()[end_row]
    end_row, end_id = end_row[stays], end_id[stays]
    return Writes(
        rows=index[torch.cat([row, end_row])],
        ids=torch.cat([before.ids[row, column], end_id]),
        deltas=torch.cat(
            [(temperature * ratio)[row, column], (temperature[:, 0] * end_ratio)[end_row]]
        ),
    )
