"""What the slot cache does, said as plainly as can be: texts are lists, slots are sets of prefixes.

Two texts share a slot exactly if they agree up to it, so the slots in use are as many as the
distinct prefixes, and prefixes with a candidate, of the sessions in use.
"""

from dataclasses import dataclass, field
from typing import Any

ACTIVE_S, HEADROOM = 5.0, 32


@dataclass
class Text:
    """A session: in use, idle, or in the line (then with what it asks for)."""

    client: str
    ticket: int
    tokens: list[int] = field(default_factory=list)
    candidates: list[int] = field(default_factory=list)
    used_at: float = 0.0
    pinned: bool = False
    slots: int = 0
    over: bool = False

    @property
    def size(self) -> int:
        return len(self.tokens) + len(self.candidates)

    @property
    def prefixes(self) -> set[tuple[int, ...]]:
        own = {tuple(self.tokens[: n + 1]) for n in range(len(self.tokens))}
        return own | {(*self.tokens, candidate) for candidate in self.candidates}


def prefixes(*groups: dict[str, Text]) -> set[tuple[int, ...]]:
    return {prefix for group in groups for text in group.values() for prefix in text.prefixes}


class NaiveCache:
    """Dictionaries are ordered: the least recently used first."""

    def __init__(self, slots: int, sessions: int, ttl: float, quota: tuple[int, int]) -> None:
        self.slots, self.most, self.ttl = slots, sessions, ttl
        self.client_sessions, self.client_slots = quota
        self.time = 0.0
        self.tickets = self.evictions = self.preemptions = 0
        self.used: dict[str, Text] = {}
        self.idle: dict[str, Text] = {}
        self.line: dict[str, Text] = {}

    def update(
        self, name: str, start: int, tokens: list[int], candidates: list[int], client: str
    ) -> bool:
        """Whether the session has it all now."""
        known = self.used.get(name) or self.idle.get(name) or Text(client, 0)
        if start > len(known.tokens):
            return False
        asked = Text(client, known.ticket, known.tokens[:start] + tokens, candidates)
        if name not in self.used and not self._enters(name, asked):
            return False
        session = self.used[name] = self.used.pop(name)
        session.used_at = self.time
        session.tokens, session.candidates = session.tokens[:start], []
        if not self._make_room(name, asked):
            return False
        session.tokens, session.candidates, session.pinned = asked.tokens, candidates, True
        return True

    def expire(self) -> None:
        for name, text in list(self.used.items()):
            if text.used_at < self.time - min(ACTIVE_S, self.ttl) and not text.pinned:
                self.idle[name] = self.used.pop(name)
                text.candidates = []
        for group, seconds in ((self.idle, self.ttl), (self.line, min(ACTIVE_S, self.ttl))):
            for name, text in list(group.items()):
                if text.used_at < self.time - seconds:
                    del group[name]

    def close(self, name: str) -> bool:
        self.line.pop(name, None)
        return bool(self.used.pop(name, None) or self.idle.pop(name, None))

    def _enters(self, name: str, asked: Text) -> bool:
        if not asked.ticket and name in self.line:
            asked.ticket = self.line[name].ticket
        elif not asked.ticket:
            self.tickets += 1
            asked.ticket = self.tickets
        asked.used_at = self.time
        asked.slots = len(asked.prefixes - prefixes(self.used))
        self.line[name] = asked
        if not self._has_turn(asked):
            return False
        del self.line[name]
        if name not in self.idle and len(self.used) + len(self.idle) == self.most:
            self._evict(asked.client)
        self.used[name] = self.idle.pop(name, Text(asked.client, asked.ticket))
        return True

    def _has_turn(self, asked: Text) -> bool:
        in_use = len(prefixes(self.used))
        used = list(self.used)
        own = [text.size for text in self.used.values() if text.client == asked.client]
        quota = self.client_sessions, self.client_slots
        asked.over = not fits(own, sum(own), [], asked.size, *quota)
        if asked.over or not fits(used, in_use, [], asked.slots, self.most, self.slots):
            return False
        ahead = [text for text in self.line.values() if text.ticket < asked.ticket]
        waiting = [text.size for text in ahead if text.client == asked.client]
        asked.over = not fits(own, sum(own), waiting, asked.size, *quota)
        slots = [text.slots for text in ahead if not text.over]
        return not asked.over and fits(used, in_use, slots, asked.slots, self.most, self.slots)

    def _make_room(self, name: str, asked: Text) -> bool:
        """For what is asked, beside what the session has of it already."""
        others = {other: text for other, text in self.used.items() if other != name}
        while self._of_client(others, asked.client) + asked.size > self.client_slots:
            if not self._preempt(name, others, asked.client):
                return False
        while len(prefixes(others, self.idle, {name: asked})) > self.slots:
            if self.idle:
                self._evict(asked.client)
            elif not self._preempt(name, others, None):
                return False
        return True

    def _of_client(self, others: dict[str, Text], client: str) -> int:
        return sum(text.size for text in others.values() if text.client == client)

    def _preempt(self, name: str, others: dict[str, Text], client: str | None) -> bool:
        mine = self.used[name].ticket
        younger = {
            text.ticket: other
            for other, text in others.items()
            if text.ticket > mine and client in (None, text.client)
        }
        if not younger:
            return False
        youngest = younger[max(younger)]
        del others[youngest]
        text = self.used.pop(youngest)
        self.line[youngest] = Text(
            text.client, text.ticket, text.tokens, text.candidates, self.time, slots=text.size
        )
        self.preemptions += 1
        return True

    def _evict(self, client: str) -> None:
        own = [name for name, text in self.idle.items() if text.client == client]
        del self.idle[(own or list(self.idle))[0]]
        self.evictions += 1


def fits(there: list[Any], used: int, ahead: list[int], asked: int, most: int, slots: int) -> bool:
    """Whether one more has room beside those who are there and those ahead of it."""
    spare = slots // HEADROOM if there or ahead else 0
    return len(there) + len(ahead) < most and used + sum(ahead) + asked + spare <= slots
