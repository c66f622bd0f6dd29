"""Labels, packs and splits: each against a version that one can check by eye."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.training import candidates, rollout
from trainer.data import (
    NO_LABEL,
    Example,
    PackedDataset,
    Rollout,
    collate,
    ending_at,
    make_example,
    pack,
    split,
)
from trainer.digests import digest

rollout_sizes = st.tuples(st.integers(1, 30), st.integers(1, 30))


def naive_labels(prompt: int, completion: int, finished: bool) -> list[float]:
    """Per position: how many tokens follow it, counted in the text itself."""
    text = ["prompt"] * prompt + ["completion"] * completion
    unseen = 0 if finished else 1
    labels = []
    for place in range(len(text)):
        to_come = len(text[place + 1 :]) + unseen
        is_state = place >= prompt - 1
        labels.append(float(to_come) if is_state and to_come else NO_LABEL)
    return labels


@given(rollout_sizes, st.booleans())
def test_labels_count_what_follows(sizes: tuple[int, int], finished: bool) -> None:
    example = make_example(rollout(*sizes, finished), 1000)
    assert example.labels.tolist() == naive_labels(*sizes, finished)
    assert example.labels.dtype == np.float32
    assert example.input_ids.tolist() == [*range(sizes[0]), *range(1000, 1000 + sizes[1])]
    assert example.is_cut == (not finished)


def test_labels_by_hand() -> None:
    no = NO_LABEL
    assert make_example(rollout(3, 4), 99).labels.tolist() == [no, no, 4, 3, 2, 1, no]
    assert make_example(rollout(3, 4, False), 99).labels.tolist() == [no, no, 5, 4, 3, 2, 1]
    assert make_example(rollout(1, 1), 99).labels.tolist() == [1, no]


@given(rollout_sizes, st.booleans(), st.integers(1, 70))
def test_what_is_cut_at_max_length_leaves_the_other_labels_true(
    sizes: tuple[int, int], finished: bool, max_length: int
) -> None:
    """The bug guarded against: a label counted to the cut instead of the completion's end."""
    whole = make_example(rollout(*sizes, finished), 1000)
    part = make_example(rollout(*sizes, finished), max_length)
    assert part.labels.tolist() == whole.labels.tolist()[:max_length]
    assert part.input_ids.tolist() == whole.input_ids.tolist()[:max_length]
    assert part.is_cut == whole.is_cut
    assert part.has_labels == (sizes[0] <= max_length)


@given(st.lists(st.integers(1, 50), max_size=300), st.integers(50, 120), st.integers(0, 9))
def test_a_pack_holds_no_more_than_capacity_and_no_example_is_lost(
    lengths: list[int], capacity: int, seed: int
) -> None:
    packs = pack(lengths, capacity, seed)
    assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= capacity for members in packs)
    assert packs == pack(lengths, capacity, seed)


@pytest.mark.parametrize("median", [150, 400, 800])
def test_packs_are_at_least_95_percent_tokens(median: int) -> None:
    generator = random.Random(median)
    drawn = [int(generator.lognormvariate(np.log(median), 0.8)) for _ in range(5000)]
    lengths = [min(max(n, 2), 3000) for n in drawn]
    packs = pack(lengths, 3000, seed=0)
    assert sum(lengths) / (3000 * len(packs)) >= 0.95


def test_packs_are_shuffled() -> None:
    """Else all samples of a prompt, and all prompts of a domain, would share their steps."""
    order = [i for members in pack([1] * 100, 10, seed=0) for i in members]
    assert order != sorted(order)
    assert order != [i for members in pack([1] * 100, 10, seed=1) for i in members]


def test_groups_are_packed_in_a_row_and_shuffled_as_wholes() -> None:
    groups = [str(i % 10) for i in range(40)]
    packs = pack([10] * 40, 40, seed=0, groups=groups)
    assert sorted(i for members in packs for i in members) == list(range(40))
    assert all(len({groups[i] for i in members}) == 1 for members in packs)
    order = [groups[members[0]] for members in packs]
    assert order != sorted(order)
    assert packs == pack([10] * 40, 40, seed=0, groups=groups)
    assert packs != pack([10] * 40, 40, seed=1, groups=groups)


def test_weights_of_a_token_mean_and_a_trajectory_mean() -> None:
    example = make_example(rollout(3, 4), 99)
    assert example.weights(False).tolist() == [0, 0, 1, 1, 1, 1, 0]
    assert example.weights(True).tolist() == [0, 0, 0.25, 0.25, 0.25, 0.25, 0]
    assert example.weights(False, 5.0).tolist() == [0, 0, 5, 1, 1, 1, 0]
    assert example.weights(True, 5.0).tolist() == [0, 0, 0.625, 0.125, 0.125, 0.125, 0]
    assert make_example(rollout(9, 4), 5).weights(True).tolist() == [0] * 5
    twice = make_example(replace(rollout(3, 4), weight=2.0), 99)
    assert twice.weights(False, 5.0).tolist() == [0, 0, 10, 2, 2, 2, 0]
    assert twice.weights(True).tolist() == [0, 0, 0.5, 0.5, 0.5, 0.5, 0]


EXAMPLES = [make_example(rollout(p, 3 + 7 * p % 9, p % 2 == 0), 20) for p in range(1, 9)]


def texts(item: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """An item cut where position_ids restart."""
    starts = [i for i, p in enumerate(item["position_ids"].tolist()) if p == 0]
    ends = [*starts[1:], len(item["position_ids"])]
    return [
        {name: t[a:b].tolist() for name, t in item.items()}
        for a, b in zip(starts, ends, strict=True)
    ]


def as_text(example: Example) -> dict[str, Any]:
    size = len(example.input_ids)
    return {
        "input_ids": example.input_ids.tolist(),
        "position_ids": list(range(size)),
        "labels": example.labels.tolist(),
        "weights": example.weights(False).tolist(),
        "is_cut": [example.is_cut] * size,
    }


def test_positions_restart_in_each_text_of_a_pack() -> None:
    dataset = PackedDataset(EXAMPLES, 20, seed=0)
    found = [text for i in range(len(dataset)) for text in texts(dataset[i])]
    order = [i for members in dataset.packs for i in members]
    assert found == [as_text(EXAMPLES[i]) for i in order]
    assert sorted(order) == list(range(len(EXAMPLES)))
    assert len(dataset) < len(EXAMPLES)


def test_collate_gives_each_pack_a_row() -> None:
    dataset = PackedDataset(EXAMPLES, 20, seed=0)
    items = [dataset[0], dataset[1]]
    batch, longest = collate(items), max(len(item["labels"]) for item in items)
    assert set(batch) == {"input_ids", "position_ids", "labels", "weights", "is_cut"}
    for name, tensor in batch.items():
        assert tensor.shape == (2, longest)
        for row, item in zip(tensor.tolist(), items, strict=True):
            own, padding = item[name].tolist(), NO_LABEL if name == "labels" else 0
            assert row == own + [padding] * (longest - len(own))
        assert tensor.dtype == items[0][name].dtype
    assert batch["input_ids"].dtype == batch["position_ids"].dtype == torch.int64
    assert (batch["labels"].dtype, batch["is_cut"].dtype) == (torch.float32, torch.bool)


def test_candidates_stand_at_their_positions_in_a_pack() -> None:
    """Of two texts of three; a position without any has shares of 0."""
    sizes = [(2, 3), (3, 4), (2, 2)]
    examples = [
        replace(make_example(rollout(*s), 9), candidates=candidates(number, [1, 2]))
        for number, s in enumerate(sizes)
    ]
    examples[1] = replace(examples[1], candidates=None)
    dataset = PackedDataset(examples, 99, seed=0)
    item = dataset[0]
    start = 0
    for index in dataset.packs[0]:
        length = len(examples[index].input_ids)
        own = {n: item[f"candidate_{n}"][start : start + length] for n in ("ids", "z", "shares")}
        c = examples[index].candidates
        at = [] if c is None else c.positions.tolist()
        assert own["shares"].sum(-1).nonzero()[:, 0].tolist() == at
        if c is not None:
            assert own["ids"][at].tolist() == c.ids.tolist()
            assert own["z"][at].tolist() == c.z.tolist()
            torch.testing.assert_close(own["shares"][at].sum(-1), torch.ones(2))
        start += length
    assert dataset.scored == 4
    assert dataset.per_scored == pytest.approx(sum(c for _, c in sizes) / 4)


def test_texts_end_where_their_thinking_does() -> None:
    """At the first marker, which counts; what ended without one had no thinking."""
    texts = [(1, [5, 9, 6, 9, 7], True), (2, [5, 9], False), (3, [5, 6], True), (4, [5, 6], False)]
    rollouts = [
        Rollout(str(n), "", np.array([9, 1]), np.array(ids), finished) for n, ids, finished in texts
    ]
    found = ending_at(rollouts, 9)
    assert [(r.prompt_id, r.completion_ids.tolist(), r.finished) for r in found] == [
        ("1", [5, 9], True),
        ("2", [5, 9], True),
        ("4", [5, 6], False),
    ]
    assert ending_at(rollouts, None) == rollouts


def test_split_keeps_the_samples_of_a_prompt_together() -> None:
    rollouts = [rollout(2, c, name=f"prompt {i}") for i in range(1000) for c in (1, 2)]
    random.Random(0).shuffle(rollouts)
    train, held_out = split(rollouts, 0.1)
    names = [{r.prompt_id for r in part} for part in (train, held_out)]
    assert not names[0] & names[1]
    assert len(train) + len(held_out) == 2000
    assert 60 < len(names[1]) < 140  # binomial: four standard deviations around 100


def test_split_depends_on_nothing_but_the_prompt_id() -> None:
    rollouts = [rollout(2, 1, name=str(i)) for i in range(200)]
    _, held_out = split(rollouts, 0.2)
    _, again = split([rollout(5, 9, name=str(i)) for i in reversed(range(100, 200))], 0.2)
    assert {r.prompt_id for r in again} == {n for n in ids(held_out) if int(n) >= 100}
    _, more = split(rollouts, 0.4)
    assert set(ids(held_out)) < set(ids(more))


def ids(rollouts: Sequence[Rollout]) -> list[str]:
    return [r.prompt_id for r in rollouts]


def test_split_at_the_ends() -> None:
    rollouts = [rollout(2, 1, name=str(i)) for i in range(50)]
    assert split(rollouts, 0) == (rollouts, [])
    assert split(rollouts, 1) == ([], rollouts)


def test_digest_sees_tokens_labels_order_and_kind() -> None:
    a, b = make_example(rollout(2, 3), 9), make_example(rollout(3, 2), 9)
    bound, cut = make_example(rollout(2, 3, False), 9), make_example(rollout(2, 3), 4)
    assert digest([a, b]) == digest([a, b])
    scored = replace(a, candidates=candidates(0, [1]))
    other = replace(a, candidates=candidates(1, [1]))
    heavy = replace(a, rollout=replace(a.rollout, weight=2.0))
    different = (
        *([a, b], [b, a], [a], [bound, b], [cut, b], [], [scored, b], [other, b]),
        *([heavy, b], [a, heavy]),
    )
    assert len({digest(e) for e in different}) == len(different)
