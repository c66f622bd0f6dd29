"""Who owns which KV slot. Plain Python, no torch: tested against a naive model in milliseconds.

A slot holds the keys, the values and the logit of one token in one place of one text. Slots form
a tree: the key (slot of the token before, token) finds the slot of a token, so a slot stands for
a whole prefix and two texts that begin alike share their slots. The dictionary compares keys, not
hashes: a collision is a miss, never a wrong answer.

        A: the cat |sat on                the ── cat ─┬─ sat ── on
        B: the cat |ran         →                     └─ ran ─┬ (candidate: off)
                                                              └ (candidate: away)

A candidate is an ordinary child of the session's last token, held until the session's next
step. "Adopting" the candidate that was emitted is therefore the same look-up as sharing a prompt.

Every session owns its whole path from the root, so a slot outlives its children. A text that is
closed is kept, as far as it is computed: the next turn of a chat, another sample or a continuation
finds it. Kept texts go first when slots are wanted, the one that was closed longest ago before all
others. A slot that no session owns and with which no kept text ends or goes on is free at once.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

ROOT = -1


class CacheFullError(Exception):
    """No slot or session is left, even after idle sessions lost theirs."""


@dataclass(slots=True, eq=False)
class Session:
    """One text and the candidates of its last step, as slots.

    path: slot of each token from the start of the text.
    candidates: slots of the last step's candidates, each a child of `path`'s end; an entry per
        candidate asked for, so a slot may stand here twice (and is owned twice).
    pinned: part of a running request; not evicted, not expired.
    client: whose it is.
    """

    path: "array[int]" = field(default_factory=lambda: array("i"))
    candidates: list[int] = field(default_factory=list)
    pinned: bool = False
    used_at: float = 0.0
    client: str = ""

    @property
    def size(self) -> int:
        """Slots, those shared with others counted as its own."""
        return len(self.path) + len(self.candidates)


class SlotCache:
    """`slots` places for tokens, at most `max_sessions` sessions; what nobody has used for `ttl`
    seconds is dropped, sessions and kept texts.

    client_sessions, client_slots: what one client's sessions may hold together, slots that are
    shared counted for each; beyond it the client's own oldest goes. None: all there is.
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
        self.size = slots
        self.max_sessions = max_sessions
        self.ttl = ttl
        self.now = now
        self.client_sessions = client_sessions or max_sessions
        self.client_slots = client_slots or slots
        self.sessions: OrderedDict[str, Session] = OrderedDict()  # least recently used first
        self.used = 0  # slots that sessions own
        self.evictions = 0
        self.expirations = 0
        self.created = 0  # slots given to a token that had none
        self.prefix_tokens = 0  # tokens of texts sent from their start, and how many had a slot
        self.prefix_hits = 0
        self.ready = bytearray(slots)  # 1: keys, values and logit of the slot are written
        self.token = array("i", bytes(4 * slots))
        self._parent = array("i", bytes(4 * slots))
        self._owners = array("i", bytes(4 * slots))  # sessions, each time they hold the slot
        self._children = array("i", bytes(4 * slots))
        self._kept: OrderedDict[int, float] = OrderedDict()  # end of a kept text → when closed
        self._child: dict[tuple[int, int], int] = {}
        self._free = list(range(slots - 1, -1, -1))

    @property
    def kept(self) -> int:
        """Slots that only kept texts need."""
        return self.size - len(self._free) - self.used

    def update(
        self,
        name: str,
        start: int,
        tokens: Sequence[int],
        candidates: Sequence[int],
        client: str = "",
    ) -> Session | None:
        """Make the session's text its first `start` tokens plus `tokens`, and hold `candidates`.

        Pins the session. Slots that are new are not `ready`. None if the session is not held as
        far as `start`. Raises CacheFullError; the session, if it existed, then still holds its
        first `start` tokens, so the same request may be repeated.
        """
        session = self.sessions.get(name)
        if session is None and start == 0:
            session = self._open(name, client)
        if session is None or start > len(session.path):
            return None
        session.pinned = True
        session.used_at = self.now()
        self.sessions.move_to_end(name)
        try:
            self._keep_limits(session, start + len(tokens) + len(candidates))
            self._move(session, start, tokens, candidates)
        except CacheFullError:
            session.pinned = False
            raise
        return session

    def unpin(self, session: Session) -> None:
        """The request that used the session is over."""
        session.pinned = False

    def close(self, name: str, keep: bool = True) -> bool:
        """End the session; its text is kept, or forgotten. False if there is none."""
        session = self.sessions.pop(name, None)
        if session is None:
            return False
        self._release(session.candidates)
        if keep:
            self._keep(session.path)
        self._release(session.path)
        return True

    def expire(self) -> None:
        """Forget the sessions and kept texts that nobody has used for `ttl` seconds."""
        limit = self.now() - self.ttl
        old = [n for n, s in self.sessions.items() if s.used_at < limit and not s.pinned]
        for name in old:
            self.close(name, keep=False)
        self.expirations += len(old)
        while self._kept and next(iter(self._kept.values())) < limit:
            self._forget()

    def forget_kept(self) -> None:
        """Forget all kept texts."""
        while self._kept:
            self._forget()

    def _open(self, name: str, client: str) -> Session:
        if self.client_sessions < self.max_sessions:
            own = sum(session.client == client for session in self.sessions.values())
            if own >= self.client_sessions:
                self._evict(f"a client's {self.client_sessions} sessions are in use", client)
        if len(self.sessions) >= self.max_sessions:
            self._evict(f"all {self.max_sessions} sessions are in use")
        session = self.sessions[name] = Session(client=client)
        return session

    def _keep_limits(self, session: Session, size: int) -> None:
        """Make room for `size` slots of the session among those of its client."""
        if self.client_slots >= self.size:
            return  # the pool itself is the limit
        while True:
            own = sum(s.size for s in self.sessions.values() if s.client == session.client)
            if own - session.size + size <= self.client_slots:
                return
            self._evict(f"a client's {self.client_slots} slots are in use", session.client)

    def _move(
        self, session: Session, start: int, tokens: Sequence[int], candidates: Sequence[int]
    ) -> None:
        # Keep what is known already, release the rest, and only then ask for new slots.
        #   path:  [0, start) as it was | [start, start + known) found | [.., end) new
        path = session.path[:start]
        for token in tokens:
            slot = self._child.get((path[-1] if path else ROOT, token))
            if slot is None:
                break
            path.append(self._owned(slot))
        known = len(path) - start
        held = []
        if known == len(tokens):
            end = path[-1] if path else ROOT
            known_slots = (self._child.get((end, candidate)) for candidate in candidates)
            held = [self._owned(slot) for slot in known_slots if slot is not None]
        old_path, old_candidates = session.path[start:], session.candidates
        session.path, session.candidates = path, []
        self._release(old_candidates)
        self._release(old_path)
        try:
            for token in tokens[known:]:
                path.append(self._own(path[-1] if path else ROOT, token))
            end = path[-1] if path else ROOT
            for token in candidates:
                session.candidates.append(self._own(end, token))
        finally:
            self._release(held)
        if start == 0:
            self.prefix_tokens += len(tokens)
            self.prefix_hits += known

    def _own(self, parent: int, token: int) -> int:
        """The child of `parent` for `token`, with one more owner; a new slot if need be."""
        slot = self._child.get((parent, token))
        if slot is None:
            while not self._free:
                if self._kept:
                    self._forget()
                else:
                    self._evict(f"all {self.size} slots are in use")
            slot = self._free.pop()
            self._child[parent, token] = slot
            self._parent[slot] = parent
            if parent != ROOT:
                self._children[parent] += 1
            self.token[slot] = token
            self.ready[slot] = 0
            self.created += 1
        return self._owned(slot)

    def _owned(self, slot: int) -> int:
        """The slot, with one more owner."""
        self.used += not self._owners[slot]
        self._owners[slot] += 1
        return slot

    def _release(self, slots: Sequence[int]) -> None:
        for slot in reversed(slots):
            self._owners[slot] -= 1
            self.used -= not self._owners[slot]
            self._free_from(slot)

    def _free_from(self, slot: int) -> None:
        """Free the slot and what is before it in its text, as far as nobody needs it."""
        while slot != ROOT:
            if self._owners[slot] or self._children[slot] or slot in self._kept:
                return
            parent = self._parent[slot]
            del self._child[parent, self.token[slot]]
            self._free.append(slot)
            if parent != ROOT:
                self._children[parent] -= 1
            slot = parent

    def _keep(self, path: Sequence[int]) -> None:
        """Keep a text that ends, as far as it is computed: what is ready is its beginning."""
        end = next((slot for slot in reversed(path) if self.ready[slot]), None)
        if end is not None:
            self._kept[end] = self.now()
            self._kept.move_to_end(end)

    def _forget(self) -> None:
        """The kept text that was closed longest ago."""
        end, _ = self._kept.popitem(last=False)
        self._free_from(end)

    def _evict(self, reason: str, client: str | None = None) -> None:
        """Close the least recently used session, of the client if one is named, not pinned."""
        for name, session in self.sessions.items():
            if not session.pinned and client in (None, session.client):
                self.close(name, keep=False)
                self.evictions += 1
                return
        raise CacheFullError(reason)
