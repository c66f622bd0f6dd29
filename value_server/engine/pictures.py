"""The pictures that a server holds, by digest, as the decoder takes them.

What a picture is stays known when its embeddings had to go: texts that have it in their slots do
not need them any more.
"""

from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import count
from threading import Lock

from torch import Tensor

from value_server.engine.errors import RequestError
from value_server.model.pictures import MAX_PIXELS, PictureError, open_picture, picture_hash
from value_server.model.sight import Grid, Seen, Sight

MOST_PIXELS = MAX_PIXELS
MOST_KNOWN = 1 << 14  # pictures of which it is known what they are; a kilobyte each


@dataclass(slots=True, eq=False)
class Picture:
    """token: what its rows are in the tree of slots: below 0, and never another picture's.
    size, grid: n and the grid, see Sight.
    seen: on the CPU; None: it went for others.
    problem: why it cannot be seen.
    """

    token: int
    size: int = 0
    grid: Grid | None = None
    seen: Seen | None = None
    problem: str | None = None


class PictureStore:
    """At most `most_bytes` of embeddings; those that nobody has asked for longest go first.

    Any thread may use it. bytes: of embeddings.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._known: OrderedDict[str, Picture] = OrderedDict()  # least recently asked for first
        self._tokens = count(-1, -1)
        self._lock = Lock()

    def __len__(self) -> int:
        with self._lock:
            return sum(picture.seen is not None for picture in self._known.values())

    def find(self, digest: str) -> Picture | None:
        """What is known of it; None: it has never come, or is forgotten."""
        with self._lock:
            if digest in self._known:
                self._known.move_to_end(digest)
            return self._known.get(digest)

    def has(self, digest: str) -> bool:
        """Whether its embeddings are here."""
        picture = self.find(digest)
        return picture is not None and picture.seen is not None

    def add(self, digest: str, seen: Seen) -> None:
        """Hold a picture. Raises ValueError where it is larger than all together may be."""
        size = bytes_of(seen)
        if size > self.most_bytes:
            raise ValueError(
                f"its embeddings have {size} bytes, at most {self.most_bytes} are held"
            )
        here = replace(
            seen, rows=seen.rows.cpu(), deep=None if seen.deep is None else seen.deep.cpu()
        )
        with self._lock:
            picture = self._of(digest)
            self._drop(picture)
            picture.size, picture.grid, picture.problem = len(here.rows), here.grid, None
            picture.seen = here
            self.bytes += size
            for other in self._known.values():
                if self.bytes <= self.most_bytes:
                    break
                self._drop(other)

    def refuse(self, digest: str, problem: str) -> None:
        """The picture is here, and cannot be seen."""
        with self._lock:
            self._of(digest).problem = problem

    def forget(self, digest: str) -> None:
        with self._lock:
            if digest in self._known:
                self._drop(self._known.pop(digest))

    def _of(self, digest: str) -> Picture:
        if digest not in self._known:
            self._known[digest] = Picture(next(self._tokens))
            if len(self._known) > MOST_KNOWN:
                self._drop(self._known.popitem(last=False)[1])
        self._known.move_to_end(digest)
        return self._known[digest]

    def _drop(self, picture: Picture) -> None:
        if picture.seen is not None:
            self.bytes -= bytes_of(picture.seen)
            picture.seen = None


def bytes_of(seen: Seen) -> int:
    return sum(part.nbytes for part in (seen.rows, seen.deep) if part is not None)


@dataclass(eq=False)
class Look:
    """A picture that waits to be looked at, and then is in the store. pixels: see Sight."""

    digest: str
    pixels: Mapping[str, Tensor]
    future: "Future[None]" = field(default_factory=Future)


def read(
    sight: Sight, store: PictureStore, digest: str, body: bytes, most_pixels: int
) -> dict[str, Tensor]:
    """Pixels of a file, for a Look; no model runs.

    Raises RequestError. A file that is no picture, or too large a one, is remembered as such.
    """
    found = picture_hash(body)
    if found != digest:
        raise RequestError(f"digest: {digest!r}, the sha256 of the body is {found}", "digest")
    try:
        picture = open_picture(body, "body", len(body), most_pixels)
        return sight.pixels(picture)
    except PictureError as error:
        problem = str(error)
    except Exception as error:  # image processors have limits of their own
        problem = f"body: the model's image processor refuses it: {error}"
    store.refuse(digest, problem)
    raise RequestError(problem, "body")
