"""Ends of sentences outside a request's own cut, which the landing may bring about all the same.

Legend: V vocabulary, B rows of a step, K candidates, L rows of them that land, M more candidates.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lenvm_vllm.steering.candidates import Candidates
from lenvm_vllm.steering.constants import LEAST_CLOSER, MORE_CLOSERS
from lenvm_vllm.steering.devices import Fetched, uploaded
from lenvm_vllm.steering.landing import sentence_gain


def likely_closers(
    logits: Tensor,
    rows: Sequence[int],
    found: Candidates,
    temperature: Tensor,
    ids: Tensor,
    closing: Tensor,
) -> tuple[Tensor, Tensor]:
    """(L, M) tokens of `ids` that are no candidates, and (L, M) their log-probabilities as of
    `Candidates.log_q`, -inf of those that would stay unlikely.

    logits: (batch, V). rows: those that land, and found: their candidates. temperature: (L,).
    ids: on the device of the logits. closing: (L,) as of `sentence_gain`.
    """
    at, own = uploaded(logits.device, torch.tensor(rows)[:, None], found.ids[:, :1].contiguous())
    top, place = logits[at, ids].topk(min(MORE_CLOSERS, len(ids)))
    first = logits[at, own]
    # One copy from the device; float32 holds every id below 2^24.
    here = torch.cat([first.float(), top.float(), ids[place].float()], dim=-1).double()
    here = Fetched(here).here()
    first, top, tokens = here.split([1, top.shape[-1], top.shape[-1]], dim=-1)
    tokens = tokens.long()
    log_q = (top - first) / temperature[:, None] + found.log_q[:, :1]
    known = ((tokens[:, :, None] == found.ids[:, None]) & found.kept[:, None]).any(-1)
    few = log_q + sentence_gain(closing)[:, None] < math.log(LEAST_CLOSER)
    return tokens, log_q.masked_fill(known | few | log_q.isnan(), -torch.inf)


def with_more(found: Candidates, rows: Sequence[int], ids: Tensor, log_q: Tensor) -> Candidates:
    """With these candidates, that are not their own, in the rows `rows`.

    ids, log_q: (L, M), as of `likely_closers`.
    """
    number, more = len(found.ids), log_q.shape[-1]
    all_ids = torch.cat([found.ids, found.ids.new_zeros(number, more)], dim=-1)
    all_q = torch.cat([found.log_q, found.log_q.new_full((number, more), -torch.inf)], dim=-1)
    own = torch.cat([found.own, found.own.new_zeros(number, more)], dim=-1)
    all_ids[rows, -more:], all_q[rows, -more:] = ids, log_q
    all_q, order = all_q.sort(dim=-1, descending=True, stable=True)
    return replace(found, ids=all_ids.gather(1, order), log_q=all_q, own=own.gather(1, order))
