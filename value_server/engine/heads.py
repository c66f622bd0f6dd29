"""What the heads made of each slot's token, and rows that read theirs. No torch.

Legend: Q queries of a pass, r rank of the lookahead head.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from value_server.engine.job import Row
from value_server.engine.session import Session
from value_server.engine.shown import Ids


class Heads:
    """z of each slot; b and q, too, where there is a lookahead head."""

    def __init__(self, slots: int, rank: int) -> None:
        """rank: r; 0: there is no lookahead head."""
        self._numbers = np.zeros((slots, 2 + rank if rank else 1), dtype=np.float32)
        self._z, self._queries = self._numbers[:, 0], self._numbers[:, 1:]

    def write(self, slots: Ids, numbers: NDArray[Any]) -> None:
        """(Q,) slots, and (Q, 1) z or (Q, 2 + r) z, b and q."""
        self._numbers[slots] = numbers

    def read(self, rows: Sequence[tuple[Row, Session]], texts: bool) -> list[Row]:
        """Give the rows their values, which are all there; those that have one that is no finite
        number get none, and are returned. texts: whether the values of their texts are wanted."""
        for row, session in rows:
            # Its candidates are not asked for yet, or were dropped: nobody waits for them.
            if row.lacks or len(session.candidates) < len(row.candidates):
                row.z = np.full(len(row.candidates), np.nan, dtype=np.float32)
        rows = [(row, session) for row, session in rows if row.z is None]
        slots = chain.from_iterable(session.candidates for _, session in rows)
        z = self._z[np.fromiter(slots, dtype=np.int64)]
        ends = [session.path[-1] for row, session in rows if row.lookahead_rank]
        queries = self._queries[np.array(ends, dtype=np.int64)]
        all_finite = _are_finite(z, queries)  # row by row only where they are not
        begin, rest, broken = 0, iter(queries), []
        for row, session in rows:
            end = begin + len(session.candidates)
            own, begin = z[begin:end], end
            query = next(rest) if row.lookahead_rank else None
            text_z = self._z[np.array(session.path, dtype=np.int64)] if texts else None
            if (all_finite or _are_finite(own, query)) and _are_finite(text_z):
                row.text_z, row.query, row.z = text_z, query, own
            else:
                broken.append(row)
        return broken


def _are_finite(*parts: NDArray[Any] | None) -> bool:
    return all(part is None or bool(np.isfinite(part).all()) for part in parts)
