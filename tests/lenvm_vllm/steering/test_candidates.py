"""The candidate cut: against the naive version, row by row.

Legend: V vocabulary. The naive version takes one row as Python floats.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lenvm_vllm.steering.candidates import Cut, cut_candidates
from tests.support.cuts import (
    INF,
    V,
    cut,
    cuts,
    random_logits,
    row_of,
    seeds,
    with_choice,
)

quick = settings(deadline=None, max_examples=80)


def naive_cut(row: Tensor, c: Cut, width: int = V) -> tuple[dict[int, float], float]:
    """({token: q}, p0) of one row."""
    weights = [math.exp(x) for x in (row / c.temperature).tolist()]
    ends = [token for token in c.eos_ids if 0 <= token < len(weights)]
    end = sum(weights[token] for token in ends)
    others = sorted(set(range(len(weights))) - set(ends), key=weights.__getitem__, reverse=True)
    total = sum(weights[token] for token in others)
    others = [token for token in others if weights[token] > 0][:width]
    if c.top_k:
        others = others[: c.top_k]
        total = sum(weights[token] for token in others)
    best = max((weights[token] for token in others), default=0.0)

    top_p = c.top_p if c.top_p < 1 else INF  # no limit, whatever a sum rounds to
    kept: dict[int, float] = {}
    before = 0.0
    for token in others:
        if before / total < top_p and weights[token] >= c.min_p * best:
            kept[token] = weights[token]
        before += weights[token]

    ahead = [weights[token] for token in others if weights[token] > end]
    may_end = (
        end > 0
        and not (c.top_k and len(ahead) >= c.top_k)
        and sum(ahead) / (total + end) < top_p
        and end >= c.min_p * best
    )
    mass = sum(kept.values())
    p0 = end / (end + mass) if may_end else 0.0
    return {token: weight / mass for token, weight in kept.items()}, p0


def assert_same(
    got: tuple[dict[int, float], float], expected: tuple[dict[int, float], float]
) -> None:
    assert got[0] == pytest.approx(expected[0], abs=1e-5)
    if expected[0] or expected[1]:
        assert got[1] == pytest.approx(expected[1], abs=1e-5)


# ---- the cut


@quick
@given(st.lists(cuts, min_size=1, max_size=5), seeds, st.sampled_from([1, 4, V, 10 * V]))
def test_cut_is_the_naive_one(limits: list[Cut], seed: int, width: int) -> None:
    logits = random_logits(len(limits), seed)
    untouched = logits.clone()
    candidates = cut_candidates(logits, limits, width)
    assert torch.equal(logits, untouched)
    for i, c in enumerate(limits):
        assert_same(row_of(candidates, i), naive_cut(logits[i], c, width))


@quick
@given(cuts, seeds)
def test_cut_without_an_end_is_that_of_hugging_face(c: Cut, seed: int) -> None:
    logits = random_logits(1, seed, blocked=0.0)
    scores = logits / c.temperature
    for limit, kind in (
        (c.top_k, TopKLogitsWarper),
        (c.top_p, TopPLogitsWarper),
        (c.min_p, MinPLogitsWarper),
    ):
        scores = kind(limit)(None, scores) if limit else scores
    candidates = cut_candidates(logits, [cut(**(vars(c) | {"eos_ids": []}))], V)
    q, p0 = row_of(candidates, 0)
    kept = (~scores[0].isneginf()).nonzero()[:, 0].tolist()
    assert_same((q, p0), ({token: float(scores.softmax(-1)[0, token]) for token in kept}, 0.0))


@quick
@given(st.lists(cuts, min_size=1, max_size=4), seeds)
def test_candidates_come_most_probable_first_and_sum_to_one(limits: list[Cut], seed: int) -> None:
    candidates = cut_candidates(random_logits(len(limits), seed), limits, V)
    for i, c in enumerate(limits):
        q = list(row_of(candidates, i)[0].values())
        assert q == sorted(q, reverse=True)
        assert not q or sum(q) == pytest.approx(1)
        assert not set(row_of(candidates, i)[0]) & set(c.eos_ids)
        if q:
            p0 = candidates.log_p0[i].exp()
            assert p0 + candidates.log_rest[i].exp() == pytest.approx(1)


def test_blocked_tokens_are_no_candidates() -> None:
    logits = torch.full((2, V), -INF)
    logits[:, [4, 9]] = 0.0
    logits[1, 0] = 0.0  # the end
    candidates = cut_candidates(logits, [cut(top_k=5), cut(top_k=5)], V)
    assert row_of(candidates, 0) == (pytest.approx({4: 0.5, 9: 0.5}), 0.0)
    assert row_of(candidates, 1) == (pytest.approx({4: 0.5, 9: 0.5}), pytest.approx(1 / 3))


def test_the_end_takes_no_place_of_another() -> None:
    """A probable end that must not come leaves as many candidates as there would be without."""
    logits = torch.arange(V, dtype=torch.float32)[None] / 3
    for limits in ({"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.4}):
        without = row_of(cut_candidates(logits, [cut(**limits, eos_ids=[])], V), 0)[0]
        logits_with = torch.cat([logits, torch.full((1, 1), 50.0)], dim=-1)
        with_end = cut_candidates(logits_with, [cut(**limits, eos_ids=[V])], V)
        assert row_of(with_end, 0)[0] == pytest.approx(without)
        assert float(with_end.log_p0.exp()) == 1.0
        assert with_end.log_rest.isfinite()  # exact, though p0 rounds to 1


def test_an_improbable_end_is_cut_as_a_token_would_be() -> None:
    logits = torch.zeros(1, V)
    logits[0, 0] = -9.0
    for limits, ends in (
        ({}, True),
        ({"top_k": 5}, False),
        ({"top_p": 0.99}, False),
        ({"min_p": 0.01}, False),
        ({"min_p": 1e-5}, True),
    ):
        p0 = row_of(cut_candidates(logits, [cut(**limits)], V), 0)[1]
        assert (p0 > 0) == ends, limits


def test_an_end_outside_the_cut_may_be_brought_about_inside_a_wider_one() -> None:
    """0.94, an end of 0.04, 0.02: at a top_p of 0.9 or a top_k of 1 it does not come by itself."""
    logits = torch.tensor([[0.04, 0.94, 0.02]]).log()
    for limits in ({"top_p": 0.9}, {"top_k": 1}, {"top_p": 0.9, "top_k": 1}, {"min_p": 0.5}):
        narrow = cut_candidates(logits, [cut(**limits)], 3)
        assert row_of(narrow, 0) == (pytest.approx({1: 1.0}), 0.0)
        assert not narrow.own_end
        for end_top_k, end_top_p, may_come in ((15, 0.999, True), (15, 0.9, False), (1, 1, False)):
            wide = cut_candidates(
                logits, [cut(**limits, end_top_k=end_top_k, end_top_p=end_top_p)], 3
            )
            assert row_of(wide, 0)[0] == pytest.approx({1: 1.0})
            assert row_of(wide, 0)[1] == pytest.approx(0.04 / 0.98 if may_come else 0.0)
            assert not wide.own_end
            assert wide.entropy() == pytest.approx(0)


def test_no_limit_cuts_nothing_however_sure_the_model_is() -> None:
    """Sums of 32-bit probabilities pass 1 by more than these tokens have."""
    logits = torch.full((1, V), 20.0)
    logits[0, [0, 5, 6]] = torch.tensor([-20.0, 61.5, -20.0])
    candidates = cut_candidates(logits, [cut()], V)
    assert int(candidates.kept.sum()) == V - 1
    assert candidates.log_p0.isfinite()


def test_several_ends_are_one() -> None:
    """Together they are probable enough, each alone is not."""
    logits = torch.tensor([[1.0, 1.0, 1.5, -INF]])
    (_, both), (_, one) = (
        row_of(cut_candidates(logits, [cut(top_k=1, eos_ids=ends)], 4), 0)
        for ends in ([0, 1, 3], [0])
    )
    assert both == pytest.approx(2 / (2 + math.exp(0.5)))
    assert one == 0.0


@pytest.mark.parametrize(
    ("open_tokens", "limits", "worth"),
    [
        ([0, 1], {}, True),
        ([1, 2], {}, True),
        ([1], {}, False),
        ([0], {}, False),
        ([0, 1], {"eos_ids": [0, 1]}, False),
        ([0, 1], {"eos_ids": []}, True),
        ([1, 2], {"top_k": 1}, False),
        ([], {}, False),
    ],
)
def test_one_candidate_leaves_nothing_to_score(
    open_tokens: list[int], limits: Any, worth: bool
) -> None:
    logits = torch.full((1, V), -INF)
    for token in open_tokens:
        logits[0, token] = token / 10
    candidates = cut_candidates(logits, [cut(**limits)], V)
    assert with_choice(candidates) == [0] * worth


@pytest.mark.parametrize(
    ("mass", "most", "eos_ids", "scored"),
    [
        (1.0, 3, [0], [5, 6, 7]),
        (1.0, 2, [0], [5, 6]),
        (0.95, 3, [0], [5, 6]),
        (0.9, 3, [0], [5]),  # the end is the other choice
        (0.9, 3, [], []),
        (0.95, 3, [], [5, 6]),
    ],
)
def test_the_likely_are_scored_where_they_leave_a_choice(
    mass: float, most: int, eos_ids: list[int], scored: list[int]
) -> None:
    logits = torch.full((1, V), -INF)
    logits[0, [5, 6, 7]] = torch.tensor([0.92, 0.05, 0.03]).log()
    logits[0, eos_ids] = 0.0
    candidates = cut_candidates(logits, [cut(eos_ids=eos_ids)], V)
    wanted = candidates.scored(torch.tensor([mass], dtype=torch.float64), torch.tensor([most]))
    assert candidates.ids[wanted].tolist() == scored


def test_all_tokens_but_a_few_may_be_ends() -> None:
    """In memory for their number, not for its square."""
    size = 100_000
    candidates = cut_candidates(torch.zeros(1, size), [cut(eos_ids=list(range(3, size)))], 15)
    expected = dict.fromkeys([0, 1, 2], 1 / 3), 1 - 3 / size
    assert_same(row_of(candidates, 0), expected)


@pytest.mark.parametrize(
    ("size", "padding"), [(1280, 0), (1280, 128), (1300, 0), (1300, 44), (5000, 1)]
)
@pytest.mark.parametrize("top_ks", [(5, 0, 40), (3, 3, 3)])
def test_the_top_of_a_large_vocabulary_is_that_of_a_sort(
    size: int, padding: int, top_ks: Any
) -> None:
    """Most of it is never sorted; some rows of the batch are no one's, in any order. padding: of
    vLLM's vocabulary, likelier than all else."""
    whole = torch.full((7, size + padding), 99.0)[1:]
    logits = whole[:, :size]
    logits[:] = torch.randn(6, size, generator=torch.Generator().manual_seed(size))
    logits[:, -1] = 9.0  # behind the last whole block
    rows, width = [4, 0, 3], 64
    cuts = [Cut(1.0, top_k, 1.0, 0.0, [7, size]) for top_k in top_ks]
    found = cut_candidates(logits, cuts, width, rows)
    logits[:, 7] = -math.inf
    for row, limit, ids, kept in zip(rows, top_ks, found.ids, found.kept, strict=True):
        sorted_ids = logits[row].argsort(descending=True, stable=True)
        assert ids[kept].tolist() == sorted_ids[: limit or width].tolist()
