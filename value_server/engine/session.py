"""A text that has slots. No torch."""

from array import array
from dataclasses import dataclass, field

from value_server.engine.shown import Hold, Shown


@dataclass(slots=True, eq=False)
class Session:
    """One text and the candidates of its last step, as slots.

    path: slot of each token from the start of the text.
    candidates: slots of the last step's candidates, each a child of `path`'s end; an entry per
        candidate asked for, so a slot may stand here twice (and is owned twice).
    pinned: part of a running request; in use however long that takes.
    lost: its slots are gone.
    shown: where its pictures are; None where it has none. hold: keeps those of which something is
        still to be computed; an idle session has none.
    """

    name: str
    client: str
    ticket: int
    path: "array[int]" = field(default_factory=lambda: array("i"))
    candidates: list[int] = field(default_factory=list)
    pinned: bool = False
    lost: bool = False
    shown: Shown | None = None
    hold: Hold | None = None
    used_at: float = 0.0

    @property
    def size(self) -> int:
        """Slots, those shared with others counted as its own."""
        return len(self.path) + len(self.candidates)
