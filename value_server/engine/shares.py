"""The shares that rows have of a pass, as arrays over all of them. No torch.

Row tells the same of one row; a pass of hundreds would wait for that longer than for a GPU.

Legend: R rows, Q queries of the pass.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from value_server.engine.job import Row
from value_server.engine.shown import Ids


@dataclass(frozen=True, slots=True)
class Shares:
    """begin, end, first, queries: (R,), as in Row."""

    rows: Sequence[Row]
    begin: Ids
    end: Ids
    first: Ids
    queries: Ids

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Shares":
        facts = [(row.begin, row.end, row.first, row.queries) for row in rows]
        return cls(rows, *(np.array(part, dtype=np.int64) for part in zip(*facts, strict=True)))

    @property
    def sizes(self) -> Ids:
        """(R,) slots that the row has in `slots`."""
        return self.begin + self.queries

    @property
    def positions(self) -> Ids:
        """(Q,) rotary position of each query; of a picture's row its first part."""
        offsets = np.repeat(self.begin - self.first, self.queries)
        places = np.arange(len(offsets)) + offsets
        positions = np.minimum(places, np.repeat(self.end, self.queries))
        for row in self.rows:
            if row.session and row.session.shown:
                positions[row.place] = row.positions
        return positions

    @property
    def slots(self) -> NDArray[np.int32]:
        """(S,) slots of the rows' texts and candidates, those of all rows."""
        parts = []
        for row in self.rows:
            assert row.session is not None
            path = row.session.path
            parts.append(path if row.end == len(path) else path[: row.end])
            if row.scored:
                parts.append(array("i", row.scored))
        return np.frombuffer(b"".join(parts), dtype=np.int32)


def written_by(rows: Sequence[Row]) -> Ids:
    """(Q,) slots of the rows' queries."""
    slots = array("i")
    for row in rows:
        assert row.session is not None
        slots += row.session.path[row.begin : row.end]
        slots.extend(row.scored)
    return np.frombuffer(slots, dtype=np.int32).astype(np.int64)
