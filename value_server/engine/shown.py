"""Where in a text its pictures are. No torch.

Legend: n rows of a picture, P places up to behind the last row of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from value_server.engine.pictures import Picture

Ids = NDArray[np.int64]


class Hold:
    """A text that needs embeddings of pictures references it; see PictureStore.hold."""


@dataclass(frozen=True, slots=True)
class Shown:
    """pictures: all that the text will have, in order.
    places: (n,) of the rows of those that it has, each; of the last one perhaps a part.
    positions: (3, P + 1) for the rotary embedding of a model whose positions have three parts,
        which are one for text; from there on they go up by one. None: a place is its position.
    whole: whether the rows of one picture see each other, and so are computed in one pass.
    """

    pictures: "Sequence[Picture]"
    places: Sequence[Ids]
    positions: Ids | None = None
    whole: bool = False

    def lacks(self, places: Sequence[Ids]) -> bool:
        """Whether these are not all rows of all pictures."""
        count = len(self.pictures)
        return len(places) < count or (count > 0 and len(places[-1]) < self.pictures[-1].size)

    def positions_at(self, places: Ids) -> Ids:
        """(n,) → (3, n), or (1, n) where positions have one part."""
        known = self.positions
        if known is None:
            return places[None]
        last = known.shape[1] - 1
        return known[:, np.minimum(places, last)] + np.maximum(places - last, 0)

    def blocks(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Of the pictures that begin there, first and behind last place, where they are `whole`."""
        if self.whole:
            ends = ((int(rows[0]), int(rows[-1]) + 1) for rows in self.places)
            yield from ((a, b) for a, b in ends if begin <= a < end)

    def whole_to(self, begin: int, end: int) -> int:
        """Where a pass from `begin` to `end` has to end, for it to cut no picture."""
        for first, last in self.blocks(begin, end):
            if end < last:
                return last if first == begin else first
        return end
