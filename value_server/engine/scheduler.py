"""Which tokens go into the next forward pass. Plain Python, no torch.

A job is one request: rows (a session's text and candidates) whose tokens must all be computed
before it can be answered. A pass takes everything that waits, from all jobs, up to two limits:
`pass_tokens` in all and `prefill_tokens` of long texts. Short rows go first, so a long prompt,
spread over several passes, delays nobody's step by more than its share of one pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from value_server.engine.cache import Session, SlotCache

SHORT = 32  # new tokens up to which a row is a step, not a prompt


@dataclass(slots=True, eq=False)
class JobRow:
    """A session in a job. `computed` of its path's tokens are known to be ready."""

    session: Session
    computed: int = -1


@dataclass(slots=True)
class Chunk:
    """Work of one pass for one row: path[start:end], then `candidates` (slots)."""

    row: JobRow
    start: int
    end: int
    candidates: Sequence[int] = field(default_factory=list)

    @property
    def queries(self) -> int:
        return self.end - self.start + len(self.candidates)


def first_missing(cache: SlotCache, row: JobRow) -> int:
    """Index of the first token of the row's text that is not ready.

    A slot is computed after everything before it, so the ready ones are a prefix.
    """
    path = row.session.path
    end = len(path)
    while end > max(row.computed, 0) and not cache.ready[path[end - 1]]:
        end -= 1
    row.computed = end
    return end


def is_done(cache: SlotCache, row: JobRow) -> bool:
    """Whether all tokens and candidates of the row are ready."""
    return first_missing(cache, row) == len(row.session.path) and all(
        cache.ready[slot] for slot in row.session.candidates
    )


def next_chunks(
    cache: SlotCache, rows: Iterable[JobRow], pass_tokens: int, prefill_tokens: int
) -> list[Chunk]:
    """The next pass: at least one token if any row is not done. A slot occurs once."""
    order = sorted(rows, key=lambda row: _missing(cache, row) > SHORT)  # stable: first come first
    taken: set[int] = set()
    chunks: list[Chunk] = []
    room, long_room = pass_tokens, prefill_tokens
    for row in order:
        path, start = row.session.path, first_missing(cache, row)
        while start < len(path) and path[start] in taken:
            start += 1  # another row of this pass computes it
        missing = len(path) - start
        if missing > SHORT:
            missing = min(missing, long_room)
            long_room -= missing
        end = start + min(missing, room)
        chunk = Chunk(row, start, end)
        room -= end - start
        if end == len(path):
            wanted = dict.fromkeys(
                s for s in row.session.candidates if not cache.ready[s] and s not in taken
            )
            chunk.candidates = list(wanted)[:room]
            room -= len(chunk.candidates)
        taken.update(path[start:end], chunk.candidates)
        if chunk.queries:
            chunks.append(chunk)
        if room <= 0:
            break
    return chunks


def _missing(cache: SlotCache, row: JobRow) -> int:
    return len(row.session.path) - first_missing(cache, row)
