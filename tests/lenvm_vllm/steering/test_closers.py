"""Ends of sentences outside a request's own cut: against a naive version, and what becomes of them.

Legend: V vocabulary, B rows, K candidates.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lenvm_vllm.steering.candidates import Candidates, cut_candidates, plan_writes
from lenvm_vllm.steering.closers import likely_closers, with_more
from lenvm_vllm.steering.constants import LEAST_CLOSER, MORE_CLOSERS
from lenvm_vllm.steering.landing import sentence_gain
from lenvm_vllm.steering.policies import steer
from tests.support.cuts import V, cut, random_logits, seeds
from tests.support.steering_rows import Row, goals_of

IDS = torch.tensor([3, 5, 6, 7, V - 1])
CUT = cut(top_k=4, temperature=0.7)


def widened(logits: Tensor, closing: float = 0.5) -> tuple[Candidates, Candidates]:
    """The candidates of all rows, and those with more."""
    found = cut_candidates(logits, [CUT] * len(logits), V)
    rows = list(range(len(logits)))
    temperature = torch.full((len(rows),), CUT.temperature, dtype=torch.float64)
    places = torch.full((len(rows),), closing, dtype=torch.float64)
    likely = likely_closers(logits, rows, found, temperature, IDS, places)
    return found, with_more(found, rows, *likely)


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_the_likeliest_that_are_no_candidates(seed: int) -> None:
    logits = random_logits(3, seed)
    found, more = widened(logits)
    for row, own in enumerate(logits.double() / CUT.temperature):
        known = found.ids[row][found.kept[row]].tolist()
        total = math.log(sum(math.exp(own[i]) for i in known))
        likely = sorted(IDS.tolist(), key=lambda i: -own[i])[:MORE_CLOSERS]
        wanted = {i: float(own[i]) - total for i in likely if i not in known}
        least = math.log(LEAST_CLOSER) - sentence_gain(0.5)
        wanted = {i: q for i, q in wanted.items() if q >= least}
        brought = more.kept[row] & ~more.own[row]
        ids, log_q = more.ids[row][brought].tolist(), more.log_q[row][brought].tolist()
        assert dict(zip(ids, log_q, strict=True)) == pytest.approx(wanted, abs=1e-5)
        # Those of the request are as they were, and all that are kept come first.
        assert more.ids[row][more.kept[row] & more.own[row]].tolist() == known
        assert more.kept[row].tolist() == sorted(more.kept[row].tolist(), reverse=True)


def closed_row(remaining: int, **fields: Any) -> tuple[dict[int, float], Candidates]:
    """What the next token may be, of a text whose full stop, token 3, is far outside its cut."""
    logits = torch.full((1, V), -20.0)
    logits[0, [8, 9, 10, 11, 3]] = torch.tensor([3.0, 2.0, 2.0, 1.0, -3.0])
    _, more = widened(logits)
    closes = more.kept & ~more.own
    text = {"q": (1.0,), "r": (300,), "p0": 0.0, "mode": "equal_to", "landing": 10}
    row = Row(remaining=remaining, **text, **fields)
    z = torch.full_like(more.log_q, 5.0)
    log_q, log_p0 = steer(
        more.log_q, more.log_p0, more.own_end, z, closes, goals_of([row]), more.own
    )
    plan_writes([0], [CUT], more, log_q, log_p0, V).apply_inplace(logits)
    p = (logits[0] / CUT.temperature).softmax(-1)
    return {i: float(p[i]) for i in p.nonzero()[:, 0].tolist()}, more


def test_it_comes_in_the_landing_alone_and_gains_there_as_any() -> None:
    """The landing opens 5 tokens before the target, the end stands a token behind."""
    assert sorted(closed_row(7)[0]) == sorted(closed_row(30)[0]) == [8, 9, 10, 11]
    for remaining, closing in (6, 0.0), (-9, 1.0):
        p, more = closed_row(remaining)
        q = float(more.log_q[more.kept & ~more.own].exp())
        odds = q * math.exp(sentence_gain(closing))
        assert p[3] == pytest.approx(odds / (1 + odds), rel=1e-4)
    assert sorted(closed_row(-10)[0]) == [8, 9, 10, 11]  # behind the landing


def test_it_is_no_candidate_of_the_paper_s_rule() -> None:
    assert 3 not in closed_row(0, greedy=True)[0]


def test_a_text_that_ends_in_time_by_itself_is_left_alone() -> None:
    logits = random_logits(1, 0)
    found, more = widened(logits)
    assert more.entropy().tolist() == found.entropy().tolist()
    row = Row(q=(1.0,), r=(3,), p0=0.0, mode="at_most", remaining=15, landing=10)
    z = torch.full_like(more.log_q, -6.0)
    closes = more.kept & ~more.own
    given = more.log_p0, more.own_end, z, closes, goals_of([row]), more.own
    log_q, _ = steer(more.log_q, *given)
    assert log_q[~more.own].isneginf().all()
    assert torch.equal(log_q[more.own], more.log_q[more.own])
