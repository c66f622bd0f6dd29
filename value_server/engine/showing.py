"""Pictures in texts: from the placeholders of a row to slots, and into the passes.

A slot's key is the token of its text (tree.py). A row of a picture has the picture's own, so that
texts share slots exactly where they show the same pictures, and never where the placeholders alone
are the same.

Legend: Q queries of a pass, n rows of a picture, H hidden size, L layers that take deep rows.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from value_server.engine.cache import SlotCache
from value_server.engine.errors import BusyError, RequestError
from value_server.engine.job import Row
from value_server.engine.memory import on_device
from value_server.engine.pictures import Picture, PictureStore
from value_server.engine.shown import Ids, Shown
from value_server.model.sight import Seen, Sight

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Placed:
    """What the cache is asked for a row."""

    tokens: Sequence[int]
    candidates: Sequence[int]
    shown: Shown


NOTHING = Shown((), ())
NEXT = -1  # any token behind a text that is no placeholder


class UnfitError(Exception):
    """A text and its pictures that do not go together."""


class Showing:
    """Belongs to the engine's thread, but for `store` and `look`. missing: rows that had to do
    without values since a picture was not there."""

    def __init__(self, sight: Sight, cache: SlotCache, most_bytes: int) -> None:
        self.sight = sight
        self.store = PictureStore(most_bytes)
        self.missing = 0
        self._cache = cache
        device = next(sight.tower.parameters()).device
        # The engine's passes do not wait for a look on a stream of its own. The store has copies
        # on the CPU, and to copy them there waits for this stream: nothing else has to.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.inference_mode()
    def look(self, digest: str, pixels: Mapping[str, Tensor]) -> None:
        """Hold a picture. pixels: see Sight. For one thread at a time, and any.

        Whatever the tower raises is remembered, and RequestError here; but BusyError stays it.
        """
        try:
            with torch.cuda.stream(self._stream):  # None: as it is
                seen = self.sight.look(pixels)
                if not len(seen.rows) or not seen.rows.isfinite().all():
                    raise ValueError("its embeddings are no finite numbers")
                self.store.add(digest, seen)
        except BusyError:
            raise
        except Exception as error:  # of a model of some author, of the device
            problem = f"body: the model cannot see it: {error}"
            if self.store.refuse(digest, problem) == 1:
                log.warning("value engine: a picture cannot be seen: %r", error)
            raise RequestError(problem, "body") from error

    def place(self, row: Row, texts: bool) -> Placed | None:
        """The row with its pictures in their places.

        None: it is refused, or has no values now; `held` then tells from where to go on. texts:
        whether its text has to be whole.
        """
        if row.start > self._cache.held(row.name):
            return Placed(row.tokens, row.candidates, NOTHING)  # the cache tells what it has
        try:
            shown = self._shown(row)
            if shown is None and texts:
                raise UnfitError("one of them is not here")
            placed = self._placed(row, shown) if shown else None
            if shown is None:
                self._miss(row)
            if texts and row.lacks:
                raise UnfitError(f"{len(row.pictures)}, and the text has not the tokens of all")
        except UnfitError as error:
            row.refused, row.held = RequestError(f"pictures: {error}", "pictures"), 0
            self._cache.close(row.name)
            return None
        return placed

    def keep(self, row: Row, shown: Shown) -> None:
        """The row has its slots: what is to be computed of its pictures stays till then, also what
        its next tokens bring of them."""
        session = row.session
        assert session is not None
        session.shown = shown if shown.pictures else None
        wanted = list(shown.pictures)
        for picture, rows in zip(shown.pictures, shown.places, strict=False):
            if len(rows) == picture.size and self._cache.ready[session.path[int(rows[-1])]]:
                wanted.remove(picture)
        session.hold = self.store.hold(wanted) if wanted else None
        if wanted and session.hold is None:
            self._cache.close(row.name, keep=False)
            self._miss(row)

    def inputs(
        self, rows: Sequence[Row], tokens: NDArray[Any], embed: nn.Module, device: torch.device
    ) -> dict[str, Any]:
        """What the decoder is given for a pass with rows of pictures. tokens: (Q,)."""
        where: list[Ids] = []
        embeddings: list[Tensor] = []
        deep: list[Tensor] = []
        for row in rows:
            for at, begin, end, seen in _shares(row):
                where.append(at)
                embeddings.append(seen.rows[begin:end])
                if seen.deep is not None:
                    deep.append(seen.deep[:, begin:end])
        ids = on_device(np.maximum(tokens, 0).astype(np.int64), device)
        taken = on_device(np.concatenate(where), device)
        embeds = embed(ids).index_copy(0, taken, _joined(embeddings, 0, device))
        parts = np.concatenate([row.parts(self.sight.axes) for row in rows], axis=1)
        positions = on_device(parts, device)
        given = {"inputs_embeds": embeds[None], "position_ids": positions}
        if self.sight.axes > 1:
            given["position_ids"] = positions[:, None]
        if deep:
            given["visual_pos_masks"] = on_device(tokens < 0, device)[None]
            given["deepstack_visual_embeds"] = list(_joined(deep, 1, device))
        return given

    def _miss(self, row: Row) -> None:
        self.missing += 1
        row.session, row.held = None, 0

    def _shown(self, row: Row) -> Shown | None:
        """Pictures of the row's text, those before its first token with their places; None where
        one is not there. Raises UnfitError."""
        if row.start:
            session = self._cache.find(row.name)
            return (session and session.shown) or NOTHING
        pictures = [self.store.find(digest) for digest in row.pictures]
        problems = [p.problem for p in pictures if p and p.problem]
        if problems:
            raise UnfitError(f"one cannot be seen: {problems[0]}")
        there = [picture for picture in pictures if picture and picture.size]
        return Shown(there, (), whole=self.sight.whole) if len(there) == len(pictures) else None

    def _placed(self, row: Row, shown: Shown) -> Placed | None:
        """Raises UnfitError."""
        places = [rows[rows < row.start] for rows in shown.places if rows[0] < row.start]
        lacks = shown.lacks(places)
        if not lacks and self.sight.placeholder not in row.tokens:
            return Placed(row.tokens, row.candidates, shown)
        if shown.whole and places and len(places[-1]) < shown.pictures[len(places) - 1].size:
            row.held = int(places[-1][0])  # such a picture comes as a whole
            return None
        tokens = self._fill(row, shown.pictures, places)
        positions = self._positions(row, tokens, shown.pictures, places)
        shown = replace(shown, places=places, positions=positions)
        row.lacks = shown.lacks(places)
        return Placed(tokens, () if row.lacks else row.candidates, shown)

    def _fill(self, row: Row, pictures: Sequence[Picture], places: list[Ids]) -> list[int]:
        """The row's tokens, the placeholders among them those of pictures, whose places are added.

        A text that ends within a picture that is computed as a whole is taken up to it.
        """
        ids = np.array(row.tokens, dtype=np.int64)
        free = np.flatnonzero(ids == self.sight.placeholder)
        had = np.empty(0, dtype=np.int64)
        if places and len(places[-1]) < pictures[len(places) - 1].size:
            had = places.pop()
        for picture in pictures[len(places) :]:
            own, free = np.split(free, [picture.size - len(had)])
            rows = np.concatenate([had, own + row.start])
            had = had[:0]
            is_part = len(rows) < picture.size
            self._check_run(picture, rows, is_part and rows[-1:] < row.start + len(ids) - 1)
            if len(rows) and is_part and self.sight.whole:
                return ids[: own[0]].tolist()
            if len(rows):
                ids[own] = picture.token
                places.append(rows)
            if is_part:
                break
        if len(free):
            those = f"are of none of its {len(pictures)} pictures"
            raise UnfitError(f"{len(free)} placeholders of the text {those}")
        return ids.tolist()

    def _check_run(self, picture: Picture, rows: Ids, is_over: Any) -> None:
        """A picture without tiles has its rows side by side, and all of them. Raises UnfitError."""
        in_one = self.sight.whole or picture.grid is not None
        if in_one and len(rows) and (rows[-1] - rows[0] >= len(rows) or is_over):
            raise UnfitError(f"one has {picture.size} rows, the text other numbers of placeholders")

    def _positions(
        self, row: Row, tokens: list[int], pictures: Sequence[Picture], places: Sequence[Ids]
    ) -> Ids | None:
        """See Shown."""
        if self.sight.axes == 1 or not places:
            return None
        session = self._cache.find(row.name)
        path = session.path[: row.start] if session and row.start else ()
        text = [*(self._cache.token[slot] for slot in path), *tokens][: int(places[-1][-1]) + 1]
        ids = [self.sight.placeholder if token < 0 else token for token in text]
        grids = [picture.grid for picture in pictures[: len(places)] if picture.grid]
        return self.sight.positions([*ids, NEXT], grids).numpy()


def _shares(row: Row) -> Iterator[tuple[Ids, int, int, Seen]]:
    """Of each picture with rows in the row's share of the pass: their places in the pass, which of
    the picture's rows they are, and the picture."""
    shown = row.session.shown if row.session else None
    for places, picture in zip(shown.places, shown.pictures, strict=False) if shown else ():
        begin, end = np.searchsorted(places, (row.begin, row.end))
        if begin < end:
            assert picture.seen is not None  # the session holds it
            yield places[begin:end] - row.begin + row.first, begin, end, picture.seen


def _joined(parts: Sequence[Tensor], dim: int, device: torch.device) -> Tensor:
    return torch.cat(list(parts), dim).to(device)
