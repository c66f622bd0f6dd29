"""A slot cache looked into: its texts, and what has to hold after every operation."""

from value_server.engine.cache import SlotCache
from value_server.engine.tree import ROOT


def check_integrity(cache: SlotCache) -> None:
    """Raises RuntimeError unless free + owned + kept = all and every owner is counted."""
    owners, children, kept = [0] * cache.size, [0] * cache.size, set()
    for session in cache.sessions.values():
        end = ROOT
        for slot in session.path:
            owners[slot] += 1
            if cache._parent[slot] != end:
                raise RuntimeError(f"slot {slot} hangs on {cache._parent[slot]}, not on {end}")
            end = slot
        for slot in session.candidates:
            owners[slot] += 1
    for session in cache.idle.values():
        if session.candidates:
            raise RuntimeError(f"idle session {session.name!r} has candidates")
    ends = [*cache._kept, *(session.path[-1] for session in cache.idle.values() if session.path)]
    for end in set(ends):
        if cache._ends[end] != ends.count(end):
            raise RuntimeError(f"slot {end}: {ends.count(end)} texts, {cache._ends[end]} counted")
    for end in ends:
        while end != ROOT:
            kept.add(end)
            end = cache._parent[end]
    owned = {slot for slot, count in enumerate(owners) if count}
    numbers = len(cache._free), len(owned), len(kept - owned)
    if sum(numbers) != cache.size or len(cache._child) != len(owned | kept):
        free, used, rest = numbers
        raise RuntimeError(
            f"{free} free + {used} owned + {rest} kept slots, expected {cache.size} in all; "
            f"{len(cache._child)} in the tree"
        )
    if cache.used != len(owned):
        raise RuntimeError(f"{cache.used} slots counted as used, {len(owned)} are")
    for parent, _ in cache._child:
        if parent != ROOT:
            children[parent] += 1
    for what, real, counted in (
        ("owners", owners, cache._owners),
        ("children", children, cache._children),
    ):
        for slot in owned | kept:
            if real[slot] != counted[slot]:
                raise RuntimeError(f"slot {slot}: {real[slot]} {what}, {counted[slot]} counted")


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


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
