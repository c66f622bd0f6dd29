"""Rows that read their values together, against slots read one by one."""

from array import array

import numpy as np
import pytest

from value_server.engine.heads import Heads
from value_server.engine.job import Row
from value_server.engine.session import Session

RANK = 3


def row_of(path: list[int], candidates: list[int], rank: int = 0, lacks: bool = False) -> Row:
    """Behind the text in the slots `path`."""
    session = Session("", "", 0, path=array("i", path), candidates=[] if lacks else candidates)
    return Row("", 0, [], candidates, rank, lacks=lacks, session=session)


@pytest.mark.parametrize("broken", [None, 1, 4, 12])
@pytest.mark.parametrize("texts", [False, True])
def test_rows_read_their_slots_and_a_bad_number_is_the_row_s_own(
    broken: int | None, texts: bool
) -> None:
    numbers = np.random.default_rng(0).standard_normal((20, 2 + RANK)).astype(np.float32)
    if broken is not None:
        numbers[broken] = np.nan
    heads = Heads(20, RANK)
    heads.write(np.arange(20), numbers)
    dropped = row_of([0, 11], [13, 14])  # nobody waits for it
    assert dropped.session is not None
    dropped.session.candidates = [13]
    rows = [
        row_of([0, 1], [2, 3, 2]),
        row_of([0, 4], [], RANK),
        row_of([], [7, 8], RANK, lacks=True),  # of a picture there is nothing yet
        dropped,
        row_of([5, 6], [12], RANK),
        row_of([0, 9], []),
    ]
    bad = heads.read([(row, row.session) for row in rows if row.session], texts)
    for number, row in enumerate(rows):
        assert row.session is not None
        read = [*row.session.candidates, *(row.session.path[-1:] if row.lookahead_rank else [])]
        read += row.session.path if texts else []
        if row.lacks or row is dropped:
            assert np.isnan(row.logits).all()
            assert len(row.logits) == len(row.candidates)
        elif broken in read:
            assert row in bad, number
            assert row.z is None
        else:
            assert row not in bad, number
            np.testing.assert_array_equal(row.logits, numbers[row.session.candidates, 0])
            if row.lookahead_rank:
                np.testing.assert_array_equal(row.lookahead, numbers[row.session.path[-1], 1:])
            if texts:
                np.testing.assert_array_equal(row.text_z, numbers[list(row.session.path), 0])
