"""The slot cache against a naive model: sessions as token lists, slots as a set of prefixes.

Two texts share a slot exactly if they agree up to it, so the slots in use must be as many as the
distinct prefixes (and prefix + candidate) of all sessions. A leak, a double free or a wrong share
shows in that count within a few operations.
"""

import random

import pytest

from tests.support.slots import check_integrity
from value_server.engine.cache import ROOT, CacheFullError, SlotCache


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
    closed: list[list[int]] = []
    full = unknown = found = 0
    for _ in range(1500):
        clock.time += rng.random()
        name = f"s{rng.randrange(9)}"
        if rng.random() < 0.05:
            known = naive.pop(name, None)
            closed += [known[0]] if known else []
            assert cache.close(name) == (known is not None)
        elif rng.random() < 0.02:
            clock.time += rng.choice([0, 40])
            cache.expire()
        else:
            old = naive.get(name, ([], []))[0]
            start = rng.choice([0, len(old), len(old), len(old), rng.randrange(len(old) + 3)])
            tokens = [rng.randrange(3) for _ in range(rng.choice([0, 1, 1, 1, 2, 12]))]
            candidates = [rng.randrange(3) for _ in range(rng.randrange(4))]
            if closed and rng.random() < 0.1:
                start, tokens = 0, closed[-1] + tokens  # the next turn of a closed text
            hits = cache.prefix_hits
            try:
                session = cache.update(name, start, tokens, candidates)
            except CacheFullError:
                full += 1
                # Still held as far as `start`: the request may be repeated.
                assert name not in cache.sessions or text(cache, name)[:start] == old[:start]
                cache.close(name, keep=False)
                session = None
            else:
                held = start == 0 or (name in naive and start <= len(old))
                assert (session is not None) == held
                unknown += not held
            if session is not None:
                naive[name] = (old[:start] + tokens, candidates)
                ends = [cache.token[slot] for slot in session.candidates]
                assert ends == candidates
                found += cache.prefix_hits > hits
                cache.unpin(session)
                if rng.random() < 0.8:
                    compute(cache, name)
        # Evicted and expired sessions are the cache's decision; the others must agree.
        naive = {n: t for n, t in naive.items() if n in cache.sessions}
        assert set(cache.sessions) == set(naive)
        for n, (tokens, _c) in naive.items():
            assert text(cache, n) == tokens
        texts = kept(cache)
        assert all(any(old[: len(t)] == t for old in closed) for t in texts)
        assert cache.used == len(prefixes(naive))
        alone = prefixes({str(i): (t, []) for i, t in enumerate(texts)}) - prefixes(naive)
        assert cache.kept == len(alone)
        check_integrity(cache)
    assert unknown > 0
    assert found > 0
    for name in list(cache.sessions):
        cache.close(name)
    assert cache.used == 0
    cache.forget_kept()
    assert cache.kept == 0
    check_integrity(cache)


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
    cache.unpin(cache.update("idle", 0, [3] * 3, []))  # type: ignore[arg-type]
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
    check_integrity(cache)


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
    with pytest.raises(RuntimeError, match="5 free \\+ 2 owned \\+ 0 kept slots, expected 8"):
        check_integrity(cache)


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
    check_integrity(cache)


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
    check_integrity(cache)
