"""Which texts have slots. Plain Python, no torch: tested against a naive model in milliseconds.

A session owns the slots of its text and of its last step's candidates (tree.py). A candidate is an
ordinary child of the text's last token, so adopting the one that was emitted is the same look-up
as sharing a prompt.

    line ──▶ in use ──▶ idle ──▶ gone          in use: asked for within ACTIVE_S, or computed
      ▲         │         │                    idle:   not, but its text is still here
      └─────────┴─────────┘ asked again        kept:   a closed text, found again by its tokens

When slots are wanted, kept texts go first, the one closed longest ago before all others, then idle
sessions, the least recently used first. What is in use goes for nobody who comes in: newcomers
wait in a line (line.py). Only when those in use grow beyond all slots does the youngest of them go
back to the line, so that the oldest go on.
"""

import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

from value_server.engine.line import Line, Room
from value_server.engine.session import Session
from value_server.engine.tree import ROOT, SlotTree

ACTIVE_S = 5.0  # a session that was asked for within so many seconds is in use


class CacheFullError(Exception):
    """Everything is in use by older sessions."""


class SlotCache(SlotTree):
    """`slots` places for tokens, at most `max_sessions` sessions; what nobody has used for `ttl`
    seconds is dropped, sessions and kept texts.

    client_sessions, client_slots: what one client may have in use, slots that are shared counted
    for each of its sessions. None: no limit of its own.
    `now` is a clock in seconds. Not thread-safe: one thread owns it.
    """

    def __init__(
        self,
        slots: int,
        max_sessions: int,
        ttl: float,
        now: Callable[[], float],
        client_sessions: int | None = None,
        client_slots: int | None = None,
    ) -> None:
        super().__init__(slots)
        self.max_sessions = max_sessions
        self.ttl = ttl
        self.now = now
        self.client_sessions = client_sessions or sys.maxsize
        self.client_slots = client_slots or sys.maxsize
        self.sessions: OrderedDict[str, Session] = OrderedDict()  # in use, least recently first
        self.idle: OrderedDict[str, Session] = OrderedDict()  # likewise
        self.line = Line()
        self.evictions = self.expirations = self.preemptions = 0
        self.prefix_tokens = 0  # tokens of texts sent from their start, and how many had a slot
        self.prefix_hits = 0
        self._kept: OrderedDict[int, float] = OrderedDict()  # end of a kept text → when closed

    @property
    def largest(self) -> int:
        """Slots that one session can have at most."""
        return min(self.size, self.client_slots)

    def find(self, name: str) -> Session | None:
        """The session, in use or idle."""
        return self.sessions.get(name) or self.idle.get(name)

    def held(self, name: str) -> int:
        """Tokens of the session's text that are here."""
        session = self.find(name)
        return len(session.path) if session else 0

    def update(
        self,
        name: str,
        start: int,
        tokens: Sequence[int],
        candidates: Sequence[int],
        client: str = "",
        waits: bool = True,
    ) -> Session | None:
        """Make the session's text its first `start` tokens plus `tokens`, and hold `candidates`.

        Pins the session. Slots that are new are not `ready`. None if it has no room, or is not
        held as far as `start`: `held` then tells from where to go on. waits: whether it has a
        place in the line until it comes in.
        """
        session = self.sessions.get(name)
        if start > (len(session.path) if session else self.held(name)):
            return None
        session = session or self._enter(name, start, tokens, candidates, client, waits)
        if session is None:
            return None
        self._touch(session)
        try:
            self._move(session, start, tokens, candidates)
        except CacheFullError:
            return None
        session.pinned = True
        return session

    def unpin(self, session: Session) -> None:
        """The request that used the session is over."""
        session.pinned = False
        if not session.lost:
            self._touch(session)

    def drop_candidates(self, session: Session) -> None:
        """Those that are not computed: nobody waits for them."""
        late = [slot for slot in session.candidates if not self.ready[slot]]
        session.candidates = [slot for slot in session.candidates if self.ready[slot]]
        self._release(late)

    def close(self, name: str, keep: bool = True) -> bool:
        """End the session; its text is kept, or forgotten. False if there is none."""
        self.line.leave(name)
        session = self.find(name)
        if session is None:
            return False
        if keep:
            self._keep(session.path)
        self._remove(session)
        return True

    def expire(self) -> None:
        """What is not used any more is idle, then gone."""
        now = self.now()
        unused, old = now - min(ACTIVE_S, self.ttl), now - self.ttl
        for session in [s for s in self.sessions.values() if s.used_at < unused]:
            if not session.pinned:
                self._rest(session)
        for session in [s for s in self.idle.values() if s.used_at < old]:
            self._remove(session)
            self.expirations += 1
        while self._kept and next(iter(self._kept.values())) < old:
            self._forget()
        self.line.forget(unused)

    def forget_kept(self) -> None:
        while self._kept:
            self._forget()

    def _enter(
        self,
        name: str,
        start: int,
        tokens: Sequence[int],
        candidates: Sequence[int],
        client: str,
        waits: bool,
    ) -> Session | None:
        """A session that was not in use, in use from now on; None if it has no room."""
        idle = self.idle.get(name)
        path = idle.path[:start] if idle else array("i")
        known, scored = self._known(path[-1] if path else ROOT, tokens, candidates)
        found = [*path, *known, *scored]
        slots = start + len(tokens) + len(set(candidates)) - len(found) + self._unowned(found)
        size = start + len(tokens) + len(candidates)
        ticket = idle.ticket if idle else None
        asker = self.line.ask(name, client, slots, size, self.now(), ticket)
        server = Room(len(self.sessions), self.max_sessions, self.used, self.size)
        let_in = self.line.may_enter(asker, server, self._quota(client))
        if let_in or not waits:
            self.line.leave(name)
        if not let_in:
            return None
        if idle:
            self._own_again(idle.path)
            self._let_go(self.idle.pop(name).path)
        elif len(self.sessions) + len(self.idle) >= self.max_sessions:
            self._evict(client)
        session = self.sessions[name] = idle or Session(name, client, asker.ticket)
        return session

    def _quota(self, client: str) -> Room | None:
        """What the client has in use; None where clients have no limits of their own."""
        if self.client_sessions == self.client_slots == sys.maxsize:
            return None  # not worth a look at all sessions
        own = [s.size for s in self.sessions.values() if s.client == client]
        return Room(len(own), self.client_sessions, sum(own), self.client_slots)

    def _touch(self, session: Session) -> None:
        session.used_at = self.now()
        self.sessions.move_to_end(session.name)

    def _move(
        self, session: Session, start: int, tokens: Sequence[int], candidates: Sequence[int]
    ) -> None:
        """Raises CacheFullError; the session then has its first `start` tokens, nothing else."""
        # Keep what is known already, release the rest, and only then ask for new slots.
        #   path:  [0, start) as it was | [start, start + known) found | [.., end) new
        path = session.path
        known, scored = self._known(path[start - 1] if start else ROOT, tokens, candidates)
        held = [*known, *scored]
        self._own_again(held)
        if old := [*path[start:], *session.candidates]:
            del path[start:]
            session.candidates = []
            self._release(old)
        try:
            missing = len(tokens) + len(set(candidates)) - len(held)
            self._make_room(session, missing, start + len(tokens) + len(candidates))
        except CacheFullError:
            self._release(held)
            raise
        path.extend(known)
        path.extend(self._own(path[-1] if path else ROOT, tokens[len(known) :]))
        if candidates:
            end = path[-1] if path else ROOT
            session.candidates = self._own(end, candidates, siblings=True)
            self._release(scored)  # each entry among the candidates owns it now
        if start == 0:
            self.prefix_tokens += len(tokens)
            self.prefix_hits += len(known)

    def _known(
        self, end: int, tokens: Sequence[int], candidates: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Slots that are there already: of the first tokens behind `end`, and of candidates."""
        known = self._find(end, tokens)
        end = known[-1] if known else end
        if len(known) < len(tokens) or not self._children[end]:
            return known, []
        return known, [slot for token in set(candidates) for slot in self._find(end, [token])]

    def _make_room(self, session: Session, slots: int, size: int) -> None:
        """Free slots for a session in use, that will have `size` of its client's."""
        if self.client_slots < sys.maxsize:  # else not worth a look at all sessions for each row
            of_client = (s.size for s in self.sessions.values() if s.client == session.client)
            own = sum(of_client) - session.size
            while own + size > self.client_slots:
                own -= self._preempt(session, session.client)
        while len(self._free) < slots:
            if self._kept:
                self._forget()
            elif self.idle:
                self._evict(session.client)
            else:
                self._preempt(session)

    def _preempt(self, asker: Session, client: str | None = None) -> int:
        """Send the youngest session in use, of the client if one is named, back to the line.

        Returns its size. Raises CacheFullError if that is the asker itself.
        """
        among = (s for s in self.sessions.values() if client in (None, s.client))
        youngest = max(among, key=lambda session: session.ticket)
        if youngest is asker:
            raise CacheFullError
        size, ticket = youngest.size, youngest.ticket
        self._remove(youngest)
        self.line.ask(youngest.name, youngest.client, size, size, self.now(), ticket)
        self.preemptions += 1
        return size

    def _evict(self, client: str) -> None:
        """The least recently used idle session, of the client if it has one."""
        own = (session for session in self.idle.values() if session.client == client)
        self._remove(next(own, None) or next(iter(self.idle.values())))
        self.evictions += 1

    def _rest(self, session: Session) -> None:
        """In use → idle: its candidates go, its text stays."""
        self._release(session.candidates)
        session.candidates, session.hold = [], None
        self._hold(session.path)
        self._release(session.path)
        self.idle[session.name] = self.sessions.pop(session.name)

    def _remove(self, session: Session) -> None:
        if self.idle.pop(session.name, None):
            self._let_go(session.path)
        else:
            del self.sessions[session.name]
            self._release(session.candidates)
            self._release(session.path)
        session.path, session.candidates = array("i"), []
        session.hold, session.lost = None, True

    def _keep(self, path: Sequence[int]) -> None:
        """Keep a text that ends, as far as it is computed: what is ready is its beginning."""
        end = next((slot for slot in reversed(path) if self.ready[slot]), None)
        if end is not None:
            if end not in self._kept:
                self._hold([end])
            self._kept[end] = self.now()
            self._kept.move_to_end(end)

    def _forget(self) -> None:
        """The kept text that was closed longest ago."""
        self._let_go([self._kept.popitem(last=False)[0]])
