"""The slot cache against a naive model: sessions as token lists, slots as a set of prefixes.

Two texts share a slot exactly if they agree up to it, so the slots in use must be as many as the
distinct prefixes (and prefix + candidate) of all sessions. A leak, a double free or a wrong share
shows in that count within a few operations.
"""

import random

import pytest

from value_server.engine.cache import CacheFullError, SlotCache


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def make(slots: int = 32, max_sessions: int = 4, ttl: float = 10.0) -> tuple[SlotCache, Clock]:
    clock = Clock()
    return SlotCache(slots, max_sessions, ttl, clock), clock


def text(cache: SlotCache, name: str) -> list[int]:
    return [cache.token[slot] for slot in cache.sessions[name].path]


def prefixes(texts: dict[str, tuple[list[int], list[int]]]) -> set[tuple[int, ...]]:
    found = set()
    for tokens, candidates in texts.values():
        found |= {tuple(tokens[: i + 1]) for i in range(len(tokens))}
        found |= {(*tokens, c) for c in candidates}
    return found


@pytest.mark.parametrize("seed", range(8))
def test_random_operations_agree_with_naive_model(seed: int) -> None:
    rng = random.Random(seed)
    cache, clock = make(slots=rng.choice([40, 80, 400]), max_sessions=6, ttl=30.0)
    naive: dict[str, tuple[list[int], list[int]]] = {}
    full = unknown = 0
    for _ in range(1500):
        clock.time += rng.random()
        name = f"s{rng.randrange(9)}"
        if rng.random() < 0.05:
            assert cache.close(name) == (naive.pop(name, None) is not None)
        elif rng.random() < 0.02:
            clock.time += rng.choice([0, 40])
            cache.expire()
        else:
            old = naive.get(name, ([], []))[0]
            start = rng.choice([0, len(old), len(old), len(old), rng.randrange(len(old) + 3)])
            tokens = [rng.randrange(3) for _ in range(rng.choice([0, 1, 1, 1, 2, 12]))]
            candidates = [rng.randrange(3) for _ in range(rng.randrange(4))]
            try:
                session = cache.update(name, start, tokens, candidates)
            except CacheFullError:
                full += 1
                # Still held as far as `start`: the request may be repeated.
                assert name not in cache.sessions or text(cache, name)[:start] == old[:start]
                cache.close(name)
                session = None
            else:
                held = start == 0 or (name in naive and start <= len(old))
                assert (session is not None) == held
                unknown += not held
            if session is not None:
                naive[name] = (old[:start] + tokens, candidates)
                ends = [cache.token[slot] for slot in session.candidates]
                assert ends == candidates
                cache.unpin(session)
        # Evicted and expired sessions are the cache's decision; the others must agree.
        naive = {n: t for n, t in naive.items() if n in cache.sessions}
        assert set(cache.sessions) == set(naive)
        for n, (tokens, _c) in naive.items():
            assert text(cache, n) == tokens
        assert cache.used == len(prefixes(naive))
        cache.check_integrity()
    assert unknown > 0
    for name in list(cache.sessions):
        cache.close(name)
    assert cache.used == 0


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
    cache.check_integrity()


def test_equal_prompts_share_slots_until_the_last_owner_leaves() -> None:
    cache, _ = make(max_sessions=64, slots=16)
    for i in range(64):
        cache.update(f"s{i}", 0, [5] * 10, [1, 2])
    assert cache.used == 12
    for i in range(63):
        cache.close(f"s{i}")
    assert cache.used == 12
    cache.check_integrity()
    cache.close("s63")
    assert cache.used == 0


def test_least_recently_used_idle_session_is_evicted() -> None:
    cache, _ = make(slots=10)
    for name, token in (("a", 1), ("b", 2)):
        cache.unpin(cache.update(name, 0, [token] * 4, []))  # type: ignore[arg-type]
    cache.unpin(cache.update("a", 4, [1], []))  # type: ignore[arg-type]
    cache.update("c", 0, [3] * 3, [])
    assert set(cache.sessions) == {"a", "c"}
    assert cache.update("b", 4, [2], []) is None
    assert cache.evictions == 1


def test_pinned_sessions_are_neither_evicted_nor_expired() -> None:
    cache, clock = make(slots=10)
    cache.update("a", 0, [1] * 8, [])
    with pytest.raises(CacheFullError, match="10 slots"):
        cache.update("b", 0, [2] * 4, [])
    clock.time = 100.0
    cache.expire()
    assert "a" in cache.sessions
    cache.check_integrity()


def test_abandoned_session_expires() -> None:
    cache, clock = make(ttl=10.0)
    cache.unpin(cache.update("a", 0, [1], [2]))  # type: ignore[arg-type]
    clock.time = 9.0
    cache.expire()
    assert (cache.expirations, cache.used) == (0, 2)
    clock.time = 11.0
    cache.expire()
    assert (cache.expirations, cache.used) == (1, 0)


def test_too_many_sessions_in_use() -> None:
    cache, _ = make(max_sessions=2)
    cache.update("a", 0, [1], [])
    cache.update("b", 0, [1], [])
    with pytest.raises(CacheFullError, match="2 sessions"):
        cache.update("c", 0, [1], [])


def test_integrity_check_names_both_numbers() -> None:
    cache, _ = make(slots=8)
    cache.update("a", 0, [1, 2], [])
    cache._free.pop()
    with pytest.raises(RuntimeError, match="5 free \\+ 2 owned slots, expected 8"):
        cache.check_integrity()


def limited(sessions: int, slots: int) -> SlotCache:
    return SlotCache(40, 10, 10.0, Clock(), sessions, slots)


def test_who_opens_too_many_sessions_loses_the_own_oldest() -> None:
    cache = limited(sessions=2, slots=40)
    cache.unpin(cache.update("other", 0, [9], [], client="x"))
    for name in ("a", "b", "c"):
        cache.unpin(cache.update(name, 0, [1], [2], client="y"))
    assert set(cache.sessions) == {"other", "b", "c"}
    cache.update("b", 1, [2], [], client="y")
    cache.update("c", 1, [2], [], client="y")
    with pytest.raises(CacheFullError, match="a client's 2 sessions"):
        cache.update("d", 0, [1], [], client="y")
    cache.update("e", 0, [1], [], client="x")
    cache.check_integrity()


def test_who_fills_the_pool_loses_the_own_oldest() -> None:
    cache = limited(sessions=10, slots=12)
    cache.unpin(cache.update("other", 0, [9] * 5, [], client="x"))
    for name, text in (("a", [1] * 6), ("b", [2] * 5), ("c", [3] * 3)):
        cache.unpin(cache.update(name, 0, text, [4], client="y"))
    assert set(cache.sessions) == {"other", "b", "c"}
    assert cache.update("c", 3, [4] * 3, [], client="y") is not None  # 6 + 6
    with pytest.raises(CacheFullError, match="a client's 12 slots"):
        cache.update("c", 6, [4] * 7, [], client="y")
    assert set(cache.sessions) == {"other", "c"}
    cache.check_integrity()
