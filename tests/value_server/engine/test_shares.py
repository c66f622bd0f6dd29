"""What a pass is told of its rows together, against what each row tells by itself."""

import random

import numpy as np

from value_server.engine.cache import SlotCache
from value_server.engine.job import Row
from value_server.engine.shares import Shares, written_by
from value_server.engine.shown import Shown


def rows_of(draw: random.Random, count: int) -> list[Row]:
    """Texts of which some are done but for their candidates, some have more to come after the pass,
    and some show a picture."""
    cache, rows, first = SlotCache(1 << 12, 64, 1.0, lambda: 0.0), [], 0
    for number in range(count):
        length = draw.randint(4, 40)
        candidates = draw.sample(range(90, 99), draw.randint(0, 8))
        session = cache.update(f"s{number}", 0, [number, *range(length - 1)], candidates)
        assert session is not None
        if draw.random() < 0.3:
            places = np.arange(1, 3)
            positions = np.array([[0, 1, 1, 2], [0, 1, 2, 2], [0, 1, 1, 2]])
            session.shown = Shown((), (places,), positions)
        begin = draw.randint(0, length)
        end = draw.choice([length, draw.randint(begin, length)])
        row = Row("", 0, [], session=session, begin=begin, end=end, first=first)
        row.scored = session.candidates if end == length else ()
        rows.append(row)
        first += row.queries
    return rows


def test_all_rows_together_are_each_row_by_itself() -> None:
    draw = random.Random(0)
    for count in (1, 2, 30):
        rows = rows_of(draw, count)
        shares = Shares.of(rows)
        assert shares.queries.tolist() == [row.queries for row in rows]
        for found, expected in (
            (shares.positions, [row.positions for row in rows]),
            (shares.slots, [row.slots(0) for row in rows]),
            (written_by(rows), [row.slots(row.begin) for row in rows]),
        ):
            np.testing.assert_array_equal(found, np.concatenate(expected))
