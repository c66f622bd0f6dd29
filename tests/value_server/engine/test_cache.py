"""The slot cache against a naive one: who is in use, idle or waiting, with what text and how many
slots. A leak, a double free, a wrong share or a wrong turn shows within a few operations."""

import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.naive_cache import NaiveCache, prefixes
from tests.support.slots import check_integrity
from value_server.engine.cache import ACTIVE_S, SlotCache
from value_server.engine.line import HEADROOM
from value_server.engine.session import Session
from value_server.engine.tree import ROOT

NAMES = ("a", "b", "c", "d", "e", "f", "g")
PAUSES = st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.0, 0.3, 1.0, 2.0, 6.0, 40.0])
WORDS = st.lists(st.integers(0, 2), min_size=5, max_size=40)
ASKS = st.tuples(
    *(st.just("ask"), PAUSES, st.sampled_from(NAMES), st.sampled_from([0, 0, 1, 1, 1, 1, 2, 3])),
    *(WORDS | st.lists(st.integers(0, 2), max_size=2), st.lists(st.integers(0, 2), max_size=3)),
)
OTHERS = st.tuples(st.sampled_from(["close", "done", "computed"]), PAUSES, st.sampled_from(NAMES))


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def make(slots: int = 32, max_sessions: int = 4, ttl: float = 10.0) -> tuple[SlotCache, Clock]:
    clock = Clock()
    return SlotCache(slots, max_sessions, ttl, clock), clock


def text(cache: SlotCache, name: str) -> list[int]:
    session = cache.sessions.get(name) or cache.idle[name]
    return [cache.token[slot] for slot in session.path]


def kept(cache: SlotCache) -> list[list[int]]:
    """The kept texts, the one closed longest ago first."""
    texts: list[list[int]] = []
    for end in cache._kept:
        texts.append([])
        while end != ROOT:
            texts[-1].insert(0, cache.token[end])
            end = cache._parent[end]
    return texts


def compute(cache: SlotCache, name: str) -> None:
    for slot in (*cache.sessions[name].path, *cache.sessions[name].candidates):
        cache.ready[slot] = 1


def use(cache: SlotCache, name: str, *asked: Any, **more: Any) -> Session | None:
    """A step that is answered at once."""
    session = cache.update(name, *asked, **more)
    if session is not None:
        cache.unpin(session)
    return session


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


def test_emitted_candidate_keeps_its_slot() -> None:
    cache, _ = make()
    session = cache.update("a", 0, [1, 2], [7, 8])
    assert session is not None
    slot = session.candidates[1]
    cache.ready[slot] = 1
    assert cache.update("a", 2, [8], [9]) is session
    assert session.path[2] == slot
    assert cache.ready[slot] == 1
    assert cache.used == 4  # 1 2 8 and candidate 9; 7 is free again
    check_integrity(cache)


def test_equal_prompts_share_slots_until_the_last_owner_leaves() -> None:
    cache, _ = make(max_sessions=64, slots=16)
    for i in range(64):
        cache.update(f"s{i}", 0, [5] * 10, [1, 2])
    assert cache.used == 12
    for i in range(63):
        cache.close(f"s{i}")
    assert cache.used == 12
    check_integrity(cache)
    cache.close("s63")
    assert cache.used == 0


def test_the_next_turn_finds_a_closed_text() -> None:
    cache, clock = make(slots=16)
    cache.update("a", 0, [1, 2, 3], [7])
    compute(cache, "a")
    cache.close("a")
    assert (cache.used, cache.kept) == (0, 3)  # its candidates are gone
    session = cache.update("b", 0, [1, 2, 3, 4], [])
    assert session is not None
    assert [cache.ready[slot] for slot in session.path] == [1, 1, 1, 0]
    assert (cache.used, cache.kept, cache.prefix_hits) == (4, 0, 3)
    cache.close("b")  # what is not computed is not kept
    assert (cache.used, cache.kept) == (0, 3)
    clock.time = 11.0
    cache.expire()
    assert (cache.kept, cache.expirations) == (0, 0)


def test_kept_texts_go_before_any_session() -> None:
    cache, _ = make(slots=10)
    for name, tokens in (("old", [1] * 3), ("new", [2] * 3)):
        cache.update(name, 0, tokens, [])
        compute(cache, name)
        cache.close(name)
    use(cache, "idle", 0, [3] * 3, [])
    cache.update("a", 0, [4] * 2, [])
    assert kept(cache) == [[2, 2, 2]]
    assert "idle" in cache.sessions
    cache.update("b", 0, [5] * 5, [])
    assert kept(cache) == []
    assert "idle" in cache.sessions
    assert cache.evictions == 0
    check_integrity(cache)


def test_a_text_that_is_closed_again_and_again_is_kept_once() -> None:
    cache, _ = make(slots=10)
    for tokens in ([1, 2], [1, 2], [1], [1, 2, 3]):
        cache.update("a", 0, tokens, [])
        compute(cache, "a")
        cache.close("a")
    assert kept(cache) == [[1, 2], [1], [1, 2, 3]]
    assert cache.kept == 3


def test_least_recently_used_idle_session_is_evicted() -> None:
    cache, clock = make(slots=10)
    for name, token in (("a", 1), ("b", 2)):
        use(cache, name, 0, [token] * 4, [])
    use(cache, "a", 4, [1], [])
    clock.time = ACTIVE_S + 1
    cache.expire()
    assert (list(cache.idle), cache.used, cache.kept) == (["b", "a"], 0, 9)
    use(cache, "c", 0, [3] * 3, [])
    assert (set(cache.sessions), set(cache.idle)) == ({"c"}, {"a"})
    assert cache.update("b", 4, [2], []) is None
    assert (cache.held("a"), cache.held("b")) == (5, 0)
    assert cache.evictions == 1


def test_who_is_idle_comes_back_with_its_text() -> None:
    cache, clock = make(slots=10)
    use(cache, "a", 0, [1, 2, 3], [7, 8])
    compute(cache, "a")
    clock.time = ACTIVE_S + 1
    cache.expire()
    session = cache.update("a", 3, [7], [])
    assert session is not None
    assert [cache.ready[slot] for slot in session.path] == [1, 1, 1, 0]  # candidates do not stay
    assert (cache.used, cache.kept, len(cache.idle)) == (4, 0, 0)
    check_integrity(cache)


def test_what_is_in_use_goes_for_no_newcomer() -> None:
    cache, clock = make(slots=10)
    use(cache, "a", 0, [1] * 5, [])
    pinned = cache.update("pinned", 0, [2] * 3, [])
    assert use(cache, "b", 0, [3] * 4, []) is None
    clock.time = 100.0
    cache.expire()
    assert set(cache.sessions) == {"pinned"}
    assert use(cache, "b", 0, [3] * 4, []) is not None
    assert pinned is cache.sessions["pinned"]
    check_integrity(cache)


def test_abandoned_session_expires() -> None:
    cache, clock = make(ttl=10.0)
    use(cache, "a", 0, [1], [2])
    clock.time = 9.0
    cache.expire()
    assert (cache.expirations, cache.used, cache.kept) == (0, 0, 1)
    clock.time = 11.0
    cache.expire()
    assert (cache.expirations, cache.kept) == (1, 0)


def test_newcomers_wait_in_a_line() -> None:
    cache, clock = make(slots=HEADROOM, max_sessions=9)
    use(cache, "a", 0, [1] * 20, [])
    assert use(cache, "large", 0, [2] * 20, []) is None
    assert use(cache, "small", 0, [3] * 5, []) is None  # it would fit, if nobody were ahead of it
    assert use(cache, "a", 20, [1], []) is not None
    cache.close("a")
    assert use(cache, "small", 0, [3] * 5, []) is not None  # it fits, and so does the large one
    assert use(cache, "large", 0, [2] * 20, []) is not None
    assert len(cache.line) == 0
    assert use(cache, "third", 0, [4] * 20, []) is None
    assert use(cache, "last", 0, [5] * 5, []) is None
    for _ in range(4):
        clock.time += ACTIVE_S / 2
        use(cache, "large", 20, [], [])
        use(cache, "small", 5, [], [])
        use(cache, "last", 0, [5] * 5, [])
        cache.expire()
    assert "last" in cache.sessions  # the third has not been asked for any more
    check_integrity(cache)


def test_who_comes_in_beside_others_has_room_to_grow() -> None:
    cache, _ = make(slots=4 * HEADROOM, max_sessions=9)
    assert use(cache, "alone", 0, [1] * 4 * HEADROOM, []) is not None
    use(cache, "alone", 28, [], [])
    assert use(cache, "b", 0, [2] * 97, []) is None
    assert use(cache, "b", 0, [2] * 96, []) is not None  # 4 are left


def test_the_oldest_go_on_when_all_grow() -> None:
    cache, _ = make(slots=12, max_sessions=9)
    for name, token in (("a", 1), ("b", 2), ("c", 3)):
        use(cache, name, 0, [token] * 4, [])
    assert use(cache, "c", 4, [3], []) is None  # it is the youngest, and keeps what it has
    assert text(cache, "c") == [3] * 4
    assert use(cache, "a", 4, [1], []) is not None
    assert (set(cache.sessions), set(cache.line.askers)) == ({"a", "b"}, {"c"})
    assert use(cache, "d", 0, [4], []) is None  # the one that was thrown out is ahead of it
    cache.close("b")
    assert use(cache, "c", 0, [3] * 5, []) is not None
    assert use(cache, "d", 0, [4], []) is not None
    assert (cache.preemptions, cache.evictions) == (1, 0)
    check_integrity(cache)


def test_integrity_check_names_both_numbers() -> None:
    cache, _ = make(slots=8)
    cache.update("a", 0, [1, 2], [])
    cache._free.pop()
    with pytest.raises(RuntimeError, match="5 free \\+ 2 owned \\+ 0 kept slots, expected 8"):
        check_integrity(cache)


def limited(sessions: int, slots: int) -> SlotCache:
    return SlotCache(40, 10, 10.0, Clock(), sessions, slots)


def test_a_client_has_so_many_sessions_in_use() -> None:
    cache = limited(sessions=2, slots=40)
    use(cache, "other", 0, [9], [], client="x")
    for name in ("a", "b", "c"):
        use(cache, name, 0, [1], [2], client="y")
    assert set(cache.sessions) == {"other", "a", "b"}
    assert use(cache, "more", 0, [1], [], client="x") is not None  # no other waits for that
    cache.now.time = ACTIVE_S + 1  # type: ignore[attr-defined]
    cache.expire()
    assert use(cache, "c", 0, [1], [2], client="y") is not None
    assert set(cache.idle) == {"other", "more", "a", "b"}
    check_integrity(cache)


def test_a_client_has_so_many_slots_in_use() -> None:
    cache = limited(sessions=10, slots=12)
    use(cache, "other", 0, [9] * 5, [], client="x")
    for name, text in (("a", [1] * 6), ("b", [2] * 5), ("c", [3] * 3)):
        use(cache, name, 0, text, [], client="y")
    assert set(cache.sessions) == {"other", "a", "b"}
    assert use(cache, "b", 5, [4] * 2, [], client="y") is None  # the youngest of this client
    assert use(cache, "a", 6, [4] * 2, [], client="y") is not None
    assert set(cache.sessions) == {"other", "a"}
    assert cache.largest == 12
    check_integrity(cache)
