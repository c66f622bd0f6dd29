"""The slot cache: what is shared, what is kept, who goes and who waits."""

from typing import Any

import pytest

from tests.support.slots import Clock, check_integrity, compute, kept, text
from value_server.engine.cache import ACTIVE_S, SlotCache
from value_server.engine.line import HEADROOM
from value_server.engine.session import Session


def make(slots: int = 32, max_sessions: int = 4, ttl: float = 10.0) -> tuple[SlotCache, Clock]:
    clock = Clock()
    return SlotCache(slots, max_sessions, ttl, clock), clock


def use(cache: SlotCache, name: str, *asked: Any, **more: Any) -> Session | None:
    """A step that is answered at once."""
    session = cache.update(name, *asked, **more)
    if session is not None:
        cache.unpin(session)
    return session


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


@pytest.mark.parametrize(
    ("limits", "first"),
    [
        ({"max_sessions": 1}, 1),
        ({"slots": 100}, 90),
        ({"slots": 200}, 190),  # the others would fit, but for the first of the line
        ({"client_sessions": 1}, 1),
        ({"client_slots": 100}, 90),
    ],
)
def test_a_long_line_is_not_looked_through_for_each_who_waits(
    limits: dict[str, int], first: int
) -> None:
    """Else a batch of a thousand would take a quarter of a second to be told that it waits."""
    cache = SlotCache(**{"slots": 1000, "max_sessions": 90} | limits, ttl=10.0, now=Clock())
    ahead, looks = cache.line._ahead, []
    cache.line._ahead = lambda asker: (  # type: ignore[method-assign]
        looks.append(asker) or other  # type: ignore[func-returns-value]
        for other in ahead(asker)
    )
    assert use(cache, "in use", 0, range(90), []) is not None
    assert use(cache, "first", 0, [-i for i in range(first)], []) is None
    for token in range(100, 200):
        assert use(cache, str(token), 0, [token] * 20, []) is None
    assert len(cache.line) == 101
    assert len(looks) <= 101


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
    for name, tokens in (("a", [1] * 6), ("b", [2] * 5), ("c", [3] * 3)):
        use(cache, name, 0, tokens, [], client="y")
    assert set(cache.sessions) == {"other", "a", "b"}
    assert use(cache, "b", 5, [4] * 2, [], client="y") is None  # the youngest of this client
    assert use(cache, "a", 6, [4] * 2, [], client="y") is not None
    assert set(cache.sessions) == {"other", "a"}
    assert cache.largest == 12
    check_integrity(cache)


@pytest.mark.parametrize("quota", [(1, None), (None, 64)])
def test_nobody_waits_for_a_client_beyond_its_limits(quota: tuple[int | None, int | None]) -> None:
    """Though the server has no room for what it asks for, either."""
    cache = SlotCache(100, 10, 10.0, Clock(), *quota)
    assert use(cache, "a", 0, [1] * 60, [], client="x") is not None
    assert use(cache, "b", 0, [2] * 50, [], client="x") is None
    assert use(cache, "c", 0, [3] * 10, [], client="y") is not None
    check_integrity(cache)
