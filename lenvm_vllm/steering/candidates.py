"""The candidate cut of a step, and the way back from a steered distribution to logits.

Legend: V vocabulary, B guided rows, K candidates, M written entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lenvm_vllm.steering.policies import log1mexp


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


@dataclass(frozen=True)
class Candidates:
    """The model's distribution over the candidates, float64 on the CPU.

    ids: (B, K) tokens that do not end the text, most probable first.
    log_q: (B, K) their log-probabilities among themselves, -inf where cut.
    log_p0: (B,) log-probability of the end, -inf where it cannot even be brought about.
    log_rest: (B,) log(1 - p0), exact where p0 rounds to 1.
    own_end: (B,) bool, whether the end is inside the request's own cut; one that is not comes
        only where it is brought about.
    """

    ids: Tensor
    log_q: Tensor
    log_p0: Tensor
    log_rest: Tensor
    own_end: Tensor

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
        log_p = torch.cat([log_p0[:, None], self.log_q + log_rest[:, None]], dim=-1)
        return torch.special.entr(log_p.exp()).sum(-1)

    def scored(self, mass: Tensor, most: Tensor) -> Tensor:
        """(B, K) bool: the most probable candidates that together have `mass` (B,) of q, `most`
        (B,) of them at most.

        None of a row where they and the end leave no choice.
        """
        q = self.log_q.exp()
        likely = self.kept & (q.cumsum(-1) - q < _limit(mass)[:, None])
        likely &= torch.arange(q.shape[-1]) < most[:, None]
        choice = likely.sum(-1) + ~self.log_p0.isneginf() > 1
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
        rows, ids = self.rows.to(logits.device), self.ids.to(logits.device)
        kept = logits[rows, ids] + self.deltas.to(logits.device, logits.dtype)
        logits[self.rows.unique().to(logits.device)] = -torch.inf
        logits[rows, ids] = kept


def eos_index(eos: list[list[int]], size: int) -> tuple[Tensor, Tensor]:
    """(M,) row and (M,) token of every end token in the vocabulary of every row."""
    pairs = [(row, token) for row, ids in enumerate(eos) for token in ids if 0 <= token < size]
    index = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return index[:, 0], index[:, 1]


def cut_candidates(logits: Tensor, cuts: list[Cut], width: int) -> Candidates:
    """Cut each row as its request says, the end apart from the rest.

    logits: (B, V), not changed. width: K at most. A token at -inf is never a candidate. The
    end counts against no limit of the others, so an end that must not come leaves them.
    """
    size, device = logits.shape[-1], logits.device
    temperature = _column(cuts, "temperature").float().to(device)
    width = min(max(max(cut.top_k, cut.end_top_k) or width for cut in cuts), width, size)
    end_ids = _sorted_ends([cut.eos_ids for cut in cuts], size).to(device)

    ends = logits.gather(1, end_ids.clamp(max=size - 1)).float() / temperature
    ends = ends.masked_fill(end_ids == size, -torch.inf)
    # With room for the ends among them, which saves a copy of the logits without them.
    top, ids = logits.topk(min(width + end_ids.shape[1], size), dim=-1)
    place = torch.searchsorted(end_ids, ids).clamp(max=end_ids.shape[1] - 1)
    top = (top.float() / temperature).masked_fill(end_ids.gather(1, place) == ids, -torch.inf)
    full = torch.full_like(temperature, torch.nan)
    if whole := [row for row, cut in enumerate(cuts) if cut.top_p < 1 and not cut.top_k]:
        x = logits[whole].float() / temperature[whole]
        rows, tokens = eos_index([cuts[row].eos_ids for row in whole], size)
        x[rows.to(device), tokens.to(device)] = -torch.inf
        full[whole] = x.logsumexp(-1, keepdim=True)

    # One copy from the device; float32 holds every id below 2^24.
    end = ends.logsumexp(-1, keepdim=True)
    here = torch.cat([top, ids.float(), end, full], dim=-1).double().cpu()
    top, ids, end, full = here.split([top.shape[-1], top.shape[-1], 1, 1], dim=-1)
    top, order = top.sort(dim=-1, descending=True, stable=True)
    ids = ids.long().gather(1, order)
    return _cut(top[:, :width], ids[:, :width], end, full, cuts)


def _sorted_ends(eos: list[list[int]], size: int) -> Tensor:
    """(B, M) the end tokens in the vocabulary of each row, ascending, padded with `size`."""
    rows = [sorted({token for token in ids if 0 <= token < size}) for ids in eos]
    width = max(1, *map(len, rows))
    return torch.tensor([[*row, *[size] * (width - len(row))] for row in rows])


def _column(cuts: list[Cut], name: str) -> Tensor:
    """(B, 1) a number of each cut."""
    return torch.tensor([[float(getattr(cut, name))] for cut in cuts], dtype=torch.float64)


def _cut(top: Tensor, ids: Tensor, end: Tensor, full: Tensor, cuts: list[Cut]) -> Candidates:
    """top, ids: (B, K) logits over temperature, sorted. end, full: (B, 1) logsumexp of the ends
    and of all other tokens, the latter NaN where only the top ones count."""
    top_k, top_p = _column(cuts, "top_k"), _column(cuts, "top_p")
    log_min_p = _column(cuts, "min_p").log()
    own_end = _end_fits(top, end, full, top_k, top_p)
    own_end &= end >= log_min_p + torch.maximum(top[:, :1], end)
    wider = _end_fits(top, end, full, _column(cuts, "end_top_k"), _column(cuts, "end_top_p"))

    top, total = _first(top, full, top_k)
    before = (top - total).exp().cumsum(-1) - (top - total).exp()
    cut = (before >= _limit(top_p)) | (top < log_min_p + top[:, :1])
    top = top.masked_fill(cut, -torch.inf)
    rest = top.logsumexp(-1, keepdim=True)
    end = end.masked_fill(~(own_end | wider), -torch.inf)
    both = torch.logaddexp(rest, end)
    log_q = torch.where(top.isneginf(), -torch.inf, top - rest)
    return Candidates(ids, log_q, (end - both)[:, 0], (rest - both)[:, 0], own_end[:, 0])


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
    temperature = _column(cuts, "temperature")
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
