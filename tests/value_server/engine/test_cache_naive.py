"""The slot cache against a naive one: who is in use, idle or waiting, with what text and how many
slots. A leak, a double free, a wrong share or a wrong turn shows within a few operations."""

import sys
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.naive_cache import NaiveCache, prefixes
from tests.support.slots import Clock, check_integrity, compute, kept, text
from value_server.engine.cache import SlotCache

NAMES = ("a", "b", "c", "d", "e", "f", "g")
PAUSES = st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.0, 0.3, 1.0, 2.0, 6.0, 40.0])
WORDS = st.lists(st.integers(0, 2), min_size=5, max_size=40)
ASKS = st.tuples(
    *(st.just("ask"), PAUSES, st.sampled_from(NAMES), st.sampled_from([0, 0, 1, 1, 1, 1, 2, 3])),
    *(WORDS | st.lists(st.integers(0, 2), max_size=2), st.lists(st.integers(0, 2), max_size=3)),
)
OTHERS = st.tuples(st.sampled_from(["close", "done", "computed"]), PAUSES, st.sampled_from(NAMES))


class Both:
    """A cache, a naive one, and what was closed."""

    def __init__(self, slots: int, sessions: int, quota: tuple[int, int]) -> None:
        self.clock = Clock()
        self.cache = SlotCache(slots, sessions, 30.0, self.clock, *quota)
        self.naive = NaiveCache(slots, sessions, 30.0, quota)
        self.closed: list[list[int]] = []

    def do(self, what: str, pause: float, name: str, *asked: Any) -> None:
        self.clock.time += pause
        self.naive.time = self.clock.time
        self.cache.expire()
        self.naive.expire()
        if what == "ask":
            self.ask(name, *asked)
        elif what == "close":
            self.closed += [text(self.cache, name)] if self.cache.held(name) else []
            assert self.cache.close(name) == self.naive.close(name)
        elif name in self.cache.sessions and what == "done":
            self.cache.unpin(self.cache.sessions[name])
            session = self.naive.used[name] = self.naive.used.pop(name)
            session.pinned, session.used_at = False, self.clock.time
        elif name in self.cache.sessions:
            compute(self.cache, name)
        self.compare()

    def ask(self, name: str, place: int, tokens: list[int], candidates: list[int]) -> None:
        """place: 0 anew, 1 behind the text, 2 within it, 3 beyond it."""
        held = self.cache.held(name)
        start = (0, held, held // 2, held + 1)[place]
        if start + len(tokens) + len(candidates) > self.cache.largest:
            return  # the engine asks for no such text
        asked = (name, start, tokens, candidates, str(NAMES.index(name) % 2))
        session = self.cache.update(*asked)
        assert (session is not None) == self.naive.update(*asked)
        if session is not None:
            assert [self.cache.token[slot] for slot in session.candidates] == candidates

    def compare(self) -> None:
        cache, naive = self.cache, self.naive
        assert set(cache.sessions) == set(naive.used)
        assert list(cache.idle) == list(naive.idle)
        assert set(cache.line.askers) == set(naive.line)
        for group in (naive.used, naive.idle):
            for name, known in group.items():
                assert text(cache, name) == known.tokens
        assert cache.used == len(prefixes(naive.used))
        assert (cache.evictions, cache.preemptions) == (naive.evictions, naive.preemptions)
        assert all(any(old[: len(t)] == t for old in self.closed) for t in kept(cache))
        check_integrity(cache)

    def empty(self) -> None:
        for name in NAMES:
            self.cache.close(name)
        assert self.cache.used == 0
        self.cache.forget_kept()
        assert self.cache.kept == 0
        check_integrity(self.cache)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(40, 130),
    st.integers(2, 7),
    st.sampled_from([(sys.maxsize, sys.maxsize), (2, 120), (3, 60)]),
    st.lists(ASKS | ASKS | ASKS | OTHERS, min_size=50, max_size=90),
)
def test_it_does_what_the_naive_one_does(
    slots: int, sessions: int, quota: tuple[int, int], operations: list[Any]
) -> None:
    both = Both(slots, sessions, quota)
    for operation in operations:
        both.do(*operation)
    both.empty()
