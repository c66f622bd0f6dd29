"""The way back from a steered distribution to logits: what is sampled is that distribution."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lenvm_vllm.steering.candidates import Candidates, Cut, Writes, cut_candidates, plan_writes
from lenvm_vllm.steering.policies import log1mexp
from tests.support.cuts import (
    INF,
    V,
    cuts,
    distribution,
    random_logits,
    row_of,
    seeds,
    with_choice,
)

quick = settings(deadline=None, max_examples=80)


def steered(candidates: Candidates, seed: int) -> tuple[Tensor, Tensor]:
    """Any (log_q, log_p0) over the same candidates, zeros and certain ends among them."""
    rng = torch.Generator().manual_seed(seed)
    shape = candidates.log_q.shape
    w = torch.rand(shape, generator=rng, dtype=torch.float64) + 1e-3
    w = torch.where(torch.rand(shape, generator=rng) < 0.3, 0.0, w)
    w[:, 0] += 1e-3  # a row is never without weight
    log_q = torch.where(candidates.kept, w, 0.0)
    log_q = (log_q / log_q.sum(-1, keepdim=True).clamp(min=1e-300)).log()
    some = torch.tensor([0.0, 1.0, 0.5, 1e-6])[torch.randint(4, shape[:1], generator=rng)]
    p0 = torch.where(candidates.log_p0.isneginf(), 0.0, some.double())
    p0 = torch.where(candidates.kept.any(-1), p0, 1.0)
    return log_q, p0.log()


def write(
    logits: Tensor, rows: list[int], limits: list[Cut], seeds_of_rows: list[int]
) -> list[dict[int, float]]:
    """Steer `rows` of `logits` in place; the probabilities wanted of each."""
    candidates = cut_candidates(logits[rows], limits, V)
    parts = [
        steered(cut_candidates(logits[[row]], [c], V), seed)
        for row, c, seed in zip(rows, limits, seeds_of_rows, strict=True)
    ]
    width = candidates.ids.shape[1]
    log_q = torch.cat(
        [torch.nn.functional.pad(q, (0, width - q.shape[1]), value=-INF) for q, _ in parts]
    )
    log_p0 = torch.cat([p0 for _, p0 in parts])
    expected = []
    for i, (row, c) in enumerate(zip(rows, limits, strict=True)):
        rest = float(log1mexp(log_p0[i]).exp())
        q = zip(candidates.ids[i].tolist(), log_q[i].exp().tolist(), strict=True)
        p = {token: rest * value for token, value in q if value > 0}
        ends = [token for token in c.eos_ids if 0 <= token < V]
        if p0 := float(log_p0[i].exp()):
            own = distribution(logits[row, ends], c.temperature).tolist()
            p |= {token: p0 * share for token, share in zip(ends, own, strict=True)}
        expected.append(p)
    plan_writes(rows, limits, candidates, log_q, log_p0, V).apply_inplace(logits)
    return expected


def choice(logits: Tensor, rows: list[int], limits: list[Cut]) -> list[int]:
    """The places in `rows` that leave a choice."""
    return with_choice(cut_candidates(logits[rows], limits, V))


@quick
@given(st.lists(cuts, min_size=1, max_size=5), seeds, st.randoms(use_true_random=False))
def test_what_is_sampled_is_the_steered_distribution(
    limits: list[Cut], seed: int, rng: Any
) -> None:
    """And the rows of others are the same to the bit, whatever is in them."""
    logits = random_logits(len(limits) + 3, seed)
    rows = rng.sample(range(len(logits)), len(limits))
    logits[[row for row in range(len(logits)) if row not in rows], 5] = math.nan
    free = choice(logits, rows, limits)
    if not free:
        return
    rows, limits = [rows[i] for i in free], [limits[i] for i in free]
    before = logits.clone()
    expected = write(logits, rows, limits, [seed + i for i in range(len(rows))])
    for row, c, p in zip(rows, limits, expected, strict=True):
        got = distribution(logits[row], c.temperature).tolist()
        assert got == pytest.approx([p.get(token, 0.0) for token in range(V)], abs=1e-5)
    others = [row for row in range(len(logits)) if row not in rows]
    assert torch.equal(logits[others].view(torch.int32), before[others].view(torch.int32))


@quick
@given(cuts, st.lists(cuts, max_size=4), seeds)
def test_company_does_not_matter(c: Cut, company: list[Cut], seed: int) -> None:
    logits = random_logits(1 + len(company), seed)
    limits = [c, *company]
    alone, together = cut_candidates(logits[:1], [c], V), cut_candidates(logits, limits, V)
    assert row_of(together, 0)[0] == pytest.approx(row_of(alone, 0)[0], rel=1e-6)
    assert row_of(together, 0)[1] == pytest.approx(row_of(alone, 0)[1], rel=1e-6, nan_ok=True)
    free = choice(logits, list(range(len(limits))), limits)
    if 0 not in free:
        return
    single, batch = logits.clone(), logits.clone()
    write(single, [0], [c], [seed])
    write(batch, free, [limits[i] for i in free], [seed + i for i in free])
    torch.testing.assert_close(batch[0], single[0], atol=1e-5, rtol=1e-6)


@quick
@given(st.lists(cuts, min_size=1, max_size=5), seeds)
def test_an_unaltered_distribution_leaves_the_candidates_logits(
    limits: list[Cut], seed: int
) -> None:
    logits = random_logits(len(limits), seed)
    candidates = cut_candidates(logits, limits, V)
    rows = with_choice(candidates)
    if not rows:
        return
    picked = [limits[i] for i in rows]
    same = cut_candidates(logits[rows], picked, V)
    after = logits.clone()
    plan_writes(rows, picked, same, same.log_q, same.log_p0, V).apply_inplace(after)
    kept = after > -INF
    torch.testing.assert_close(after[kept], logits[kept], atol=1e-5, rtol=1e-6)
    assert kept[rows].any(-1).all()


def test_writes_add_and_close_the_rest_of_the_row() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, -INF, 9.0]])
    writes = Writes(
        rows=torch.tensor([2, 2, 0]),
        ids=torch.tensor([0, 1, 2]),
        deltas=torch.tensor([0.5, 3.0, -1.0], dtype=torch.float64),
    )
    writes.apply_inplace(logits)
    assert logits.tolist() == [[-INF, -INF, 2.0], [4.0, 5.0, 6.0], [7.5, -INF, -INF]]
