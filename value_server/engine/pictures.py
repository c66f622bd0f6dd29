"""The pictures that a server holds, by digest, as the decoder takes them.

What a picture is stays known when its embeddings had to go: texts that have it in their slots do
not need them any more.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import count
from threading import Lock
from weakref import WeakSet

from torch import Tensor

from value_server.engine.errors import BusyError, RequestError
from value_server.engine.shown import Hold
from value_server.model.pictures import MAX_PIXELS, PictureError, open_picture, picture_hash
from value_server.model.sight import Grid, Seen, Sight

MOST_PIXELS = MAX_PIXELS
MOST_RATIO = 200  # of the sides, as Qwen's; some processors scale the short one to a fixed length
MOST_KNOWN = 1 << 14  # pictures of which it is known what they are; a kilobyte each
MOST_FAILURES = 3  # of one picture; device memory may have been short the first time


@dataclass(slots=True, eq=False)
class Picture:
    """token: what its rows are in the tree of slots: below 0, and never another picture's.
    size, grid: n and the grid, see Sight.
    seen: on the CPU; None: it went for others. holds: of texts that need it to be there.
    problem: why it cannot be seen; failures: how often that was found.
    """

    token: int
    size: int = 0
    grid: Grid | None = None
    seen: Seen | None = None
    holds: "WeakSet[Hold]" = field(default_factory=WeakSet)
    problem: str | None = None
    failures: int = 0


class PictureStore:
    """At most `most_bytes` of embeddings; those that nobody has asked for longest go first, and
    none that a text needs.

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

    def problem(self, digest: str) -> str | None:
        """Why it cannot be seen, where it is not tried any more."""
        picture = self.find(digest)
        return picture.problem if picture and picture.failures >= MOST_FAILURES else None

    def hold(self, pictures: Iterable[Picture]) -> Hold | None:
        """Keeps their embeddings here as long as it is referenced; None where some are not here."""
        hold = Hold()
        with self._lock:
            for picture in pictures:
                if picture.seen is None:
                    return None
                picture.holds.add(hold)
        return hold

    def add(self, digest: str, seen: Seen) -> None:
        """Hold a picture. Raises ValueError where it is larger than all together may be, BusyError
        where texts need what would have to go for it."""
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
            if picture.seen is not None:
                return
            self._make_room(size)
            picture.size, picture.grid = len(here.rows), here.grid
            picture.problem, picture.failures = None, 0
            picture.seen = here
            self.bytes += size

    def refuse(self, digest: str, problem: str) -> int:
        """The picture is here, and cannot be seen; returns its failures."""
        with self._lock:
            picture = self._of(digest)
            picture.problem = problem
            picture.failures += 1
            return picture.failures

    def forget(self, digest: str) -> None:
        with self._lock:
            if digest in self._known:
                self._drop(self._known.pop(digest))

    def _of(self, digest: str) -> Picture:
        if digest not in self._known:
            self._known[digest] = Picture(next(self._tokens))
            if len(self._known) > MOST_KNOWN:
                oldest = next(known for known, other in self._known.items() if not other.holds)
                self._drop(self._known.pop(oldest))
        self._known.move_to_end(digest)
        return self._known[digest]

    def _make_room(self, size: int) -> None:
        """Raises BusyError; then none went."""
        free = [p for p in self._known.values() if p.seen and not p.holds]
        held = self.bytes - sum(bytes_of(p.seen) for p in free if p.seen)
        if held + size > self.most_bytes:
            raise BusyError(f"texts that are read now need {held} bytes of pictures: try again")
        for picture in free:
            if self.bytes + size <= self.most_bytes:
                break
            self._drop(picture)

    def _drop(self, picture: Picture) -> None:
        if picture.seen is not None:
            self.bytes -= bytes_of(picture.seen)
            picture.seen = None


def bytes_of(seen: Seen) -> int:
    return sum(part.nbytes for part in (seen.rows, seen.deep) if part is not None)


def read(
    sight: Sight, store: PictureStore, digest: str, body: bytes, most_pixels: int
) -> dict[str, Tensor]:
    """Pixels of a file, as Sight.look takes them; no model runs.

    Raises RequestError. A file that is no picture, or too large a one, is remembered as such.
    """
    found = picture_hash(body)
    if found != digest:
        raise RequestError(f"digest: {digest!r}, the sha256 of the body is {found}", "digest")
    try:
        picture = open_picture(body, "body", len(body), most_pixels)
        short, long = sorted(picture.size)
        if long > MOST_RATIO * short:
            raise PictureError(f"body: {long} by {short} pixels, more than {MOST_RATIO} to 1")
        return sight.pixels(picture)
    except PictureError as error:
        problem = str(error)
    except Exception as error:  # image processors have limits of their own
        problem = f"body: the model's image processor refuses it: {error}"
    store.refuse(digest, problem)
    raise RequestError(problem, "body")
