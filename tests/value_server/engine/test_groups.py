"""Which rows are computed together."""

import numpy as np
import pytest
import torch

from value_server.engine.attention import GROUP_AREA, SHORT_AREA, groups_of
from value_server.engine.cache import SlotCache
from value_server.engine.job import Row

CPU = torch.device("cpu")


def rows_of(lengths: list[int], new: int) -> list[Row]:
    """Texts of these lengths, whose last `new` tokens are in the pass."""
    cache = SlotCache(1 << 17, 512, 1.0, lambda: 0.0)
    rows, first = [], 0
    for number, length in enumerate(lengths):
        session = cache.update(f"s{number}", 0, [number, *range(length - 1)], [])
        assert session is not None
        row = Row("", 0, [], session=session, begin=length - new, end=length, first=first)
        rows.append(row)
        first += row.queries
    return rows


def test_short_rows_are_with_rows_of_as_many_queries_and_similar_length() -> None:
    lengths = [100, 500, 110, 400, 390, 1000, 120]
    rows = rows_of(lengths, new=5)
    rows += rows_of([100], new=4)
    groups = groups_of(rows, 0, CPU)
    assert all(group.short for group in groups)
    found = [(group.height, [row.end for row in group.rows]) for group in groups]
    assert found == [(4, [100]), (5, [100, 110, 120]), (5, [400, 390, 500]), (5, [1000])]
    groups = groups_of(rows_of([100, 110, 1000, 120], new=90), 0, CPU)
    assert sorted(len(group.rows) for group in groups) == [1, 3]
    assert not any(group.short for group in groups)


def test_short_rows_gather_no_more_than_caches_hold() -> None:
    groups = groups_of(rows_of([1000] * 18 + [9000], new=1), 0, CPU)
    assert [len(group.rows) for group in groups] == [8, 8, 2, 1]
    assert all(1024 * len(group.rows) <= SHORT_AREA for group in groups[:-1])


def test_no_group_gathers_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("value_server.engine.attention.SHORT_QUERIES", 0)
    rows = rows_of([1000] * 70, new=1)
    groups = groups_of(rows, 0, CPU)
    assert [len(group.rows) for group in groups] == [64, 6]
    assert all(1024 * len(group.rows) <= GROUP_AREA for group in groups)
    assert [row for group in groups for row in group.rows] == rows


def test_a_window_gathers_what_its_queries_see() -> None:
    (group,) = groups_of(rows_of([1000], new=2), 7, CPU)
    slots, bias = group._plan(50, 1, 1, torch.float32)
    assert (slots.shape, bias.shape) == ((64,), (1, 2, 64))
    seen = np.array(rows_of([1000], new=2)[0].slots(949))
    np.testing.assert_array_equal(slots[:51], seen)
    assert (slots[51:] == 7).all()
    assert bias.isfinite().sum(-1).tolist() == [[50, 50]]
