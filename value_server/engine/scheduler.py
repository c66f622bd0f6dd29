"""Which tokens go into the next forward pass. Plain Python, no torch.

A pass takes what is missing of every row of every job, up to its limits (pace.py). Short rows go
first, and a long prompt, spread over several passes, mostly goes into passes of its own: it delays
nobody's step by more than one of these.
"""

from array import array
from collections.abc import Iterable

from value_server.engine.cache import SlotCache
from value_server.engine.job import Row
from value_server.engine.pace import Limits
from value_server.engine.session import Session

SHORT = 32  # new tokens up to which a row is a step, not a prompt


def is_done(cache: SlotCache, session: Session) -> bool:
    """Whether the session's text and candidates have their values."""
    path, ready = session.path, cache.ready
    text = not path or ready[path[-1]] == 1
    return text and all(map(ready.__getitem__, session.candidates))


def next_pass(cache: SlotCache, rows: Iterable[Row], limits: Limits) -> list[Row]:
    """The rows of the next pass, with their shares of it.

    No slot occurs twice; at least one token does, if any row is not done.
    """
    short: list[tuple[Row, Session]] = []
    long: list[tuple[Row, Session]] = []
    for row in rows:
        session = row.session
        if session is not None and row.z is None:
            count = missing(cache, session)
            row.begin = len(session.path) - count
            (long if count > SHORT else short).append((row, session))
    ready, taken = cache.ready, set[int]()
    chosen: list[Row] = []
    room, long_room = limits.tokens, limits.prefill
    for row, session in (*short, *long):  # in each the first come first
        path = session.path
        while row.begin < len(path) and path[row.begin] in taken:
            row.begin += 1  # another row of this pass computes it
        count = len(path) - row.begin
        if count > SHORT:
            count = min(count, long_room) if limits.beside or not chosen else 0
            long_room -= count
        row.end = row.begin + min(count, room)
        if session.shown:
            row.end = session.shown.whole_to(row.begin, row.end)
        row.scored = ()
        if session.candidates and row.end == len(path):
            new = [s for s in session.candidates if not ready[s] and s not in taken]
            row.scored = array("i", dict.fromkeys(new))[: max(0, room - (row.end - row.begin))]
        taken.update(path[row.begin : row.end], row.scored)
        row.first = limits.tokens - room
        queries = row.queries
        room -= queries
        if queries:
            chosen.append(row)
        if room <= 0 or len(chosen) == limits.rows:
            break
    return chosen


def missing(cache: SlotCache, session: Session) -> int:
    """Tokens at the end of the text that have no values.

    A slot is computed after everything before it, so the ready ones are a prefix.
    """
    count = 0
    for slot in reversed(session.path):
        if cache.ready[slot]:
            break
        count += 1
    return count
