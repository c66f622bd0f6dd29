"""Who may come in where not all have room: a line, first come first served. No torch.

A session gets a ticket when it is asked for the first time, and keeps it in the line, in use, and
in the line again. Whoever comes in needs room for everybody with an earlier ticket who waits, too:
a short text does not overtake a long one for ever. What is not asked for any more has no place.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

HEADROOM = 32  # one of so many slots stays free beside a newcomer: who is there will grow


@dataclass(slots=True)
class Asker:
    """A session that waits.

    slots: that have to be found for it. size: its own and those shared with others.
    over: whether its own client's limits keep it out; then nobody waits behind it.
    """

    client: str
    slots: int
    size: int
    ticket: int
    asked_at: float
    over: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """What is in use of what there is: of a server, or of a client."""

    sessions: int
    most_sessions: int
    slots: int
    most_slots: int

    def takes(self, slots: int, ahead: Iterable[int] = ()) -> bool:
        """Whether one more with `slots` has room beside those ahead of it, with theirs.

        No more of these are looked at than have room.
        """
        others, asked = self.sessions, self.slots + slots
        fits = self._fits(others, asked)
        for more in ahead if fits else ():
            others, asked = others + 1, asked + more
            if not self._fits(others, asked):
                return False
        return fits

    def _fits(self, others: int, asked: int) -> bool:
        spare = self.most_slots // HEADROOM if others else 0
        return others < self.most_sessions and asked + spare <= self.most_slots


class Line:
    """The sessions that wait, by name."""

    def __init__(self) -> None:
        self.askers: dict[str, Asker] = {}
        self._tickets = 0

    def __len__(self) -> int:
        return len(self.askers)

    def new_ticket(self) -> int:
        self._tickets += 1
        return self._tickets

    def ask(
        self, name: str, client: str, slots: int, size: int, now: float, ticket: int | None = None
    ) -> Asker:
        """A place, the one that it has if it has one. ticket: that it has from before."""
        old = self.askers.get(name)
        if ticket is None:
            ticket = old.ticket if old else self.new_ticket()
        asker = self.askers[name] = Asker(client, slots, size, ticket, now)
        return asker

    def may_enter(self, asker: Asker, server: Room, client: Room | None) -> bool:
        """Whether it is the turn of `asker`, and there is room. client: what its own has; None
        where clients have no limits of their own."""
        # Told also where the server is full: else those behind it would wait for one kept out.
        asker.over = client is not None and not client.takes(asker.size)
        if asker.over or not server.takes(asker.slots):
            return False  # the usual case where many wait: none of them is looked at
        if client:
            own = (other.size for other in self._ahead(asker) if other.client == asker.client)
            asker.over = not client.takes(asker.size, own)
        all_ahead = (other.slots for other in self._ahead(asker) if not other.over)
        return not asker.over and server.takes(asker.slots, all_ahead)

    def leave(self, name: str) -> None:
        self.askers.pop(name, None)

    def forget(self, before: float) -> None:
        """Those who have not asked since."""
        for name in [name for name, asker in self.askers.items() if asker.asked_at < before]:
            del self.askers[name]

    def _ahead(self, asker: Asker) -> Iterator[Asker]:
        return (other for other in self.askers.values() if other.ticket < asker.ticket)
