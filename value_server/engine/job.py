"""What the engine is asked, how far it has come with it, and what it answers. No torch.

Legend: K candidates, T tokens, r rank of the lookahead head, n queries of a row in one pass,
S slots that they see.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from value_server.engine.errors import RequestError
from value_server.engine.session import Session


@dataclass(slots=True, eq=False)
class Row:
    """One session's part of a step, from the wire to the attention.

        text   [0 ..... begin)  [begin ... end)  [end ...   candidates, each behind the whole text
                computed         this pass        later     `scored` are those of this pass

    name, start, tokens, candidates, lookahead_rank: what is asked; see contract.wire.StepRequest.
    pictures: digests of those of its text, if its start is 0.
    lacks: whether tokens of some of its session's are still to come: then there are no values.
    session: its slots, from admission on as long as it has and needs them.
    dropped: a later job has asked for the session; this one is not computed any further.
    held, refused: what is known of the answer so far.
    z, text_z, query: (K,) and (T,) logits of the candidates and the text, and (1 + r,) b and q
        behind the text, when they are all there; z is set last.
    begin, end, scored: its share of the next pass, which the scheduler sets; `scored` are slots.
    first: where its queries begin among those of the pass.
    """

    name: str
    start: int
    tokens: Sequence[int]
    candidates: Sequence[int] = ()
    lookahead_rank: int = 0
    pictures: Sequence[str] = ()
    lacks: bool = False
    session: Session | None = None
    dropped: bool = False
    held: int = field(init=False)
    refused: RequestError | None = None
    z: NDArray[np.float32] | None = None
    text_z: NDArray[np.float32] | None = None
    query: NDArray[np.float32] | None = None
    begin: int = 0
    end: int = 0
    scored: Sequence[int] = ()
    first: int = 0

    def __post_init__(self) -> None:
        self.held = self.start

    @property
    def logits(self) -> NDArray[np.float32]:
        """(K,) z, NaN as long as they are not there."""
        z = self.z  # the engine's thread may set it any time
        return np.full(len(self.candidates), np.nan, dtype=np.float32) if z is None else z

    @property
    def lookahead(self) -> NDArray[np.float32]:
        """(1 + r,) b and q, NaN as long as they are not there; none where none are asked for."""
        query = self.query  # as above
        size = 1 + self.lookahead_rank if self.lookahead_rank else 0
        return np.full(size, np.nan, dtype=np.float32) if query is None else query

    @property
    def settled(self) -> bool:
        """Whether its answer will not change any more; asked once it was admitted."""
        return self.session is None or self.z is not None

    @property
    def queries(self) -> int:
        """n, tokens and candidates of the pass."""
        return self.end - self.begin + len(self.scored)

    @property
    def place(self) -> slice:
        """Of its queries in the pass."""
        return slice(self.first, self.first + self.queries)

    @property
    def places(self) -> NDArray[np.int64]:
        """(n,) place of each query in the text; all candidates stand behind its end."""
        return np.minimum(np.arange(self.begin, self.begin + self.queries), self.end)

    @property
    def positions(self) -> NDArray[np.int64]:
        """(n,) rotary position of each query; of a picture's row its first part."""
        shown = self.session.shown if self.session else None
        return shown.positions_at(self.places)[0] if shown else self.places

    def parts(self, axes: int) -> NDArray[np.int64]:
        """(axes, n) the same with all parts."""
        shown = self.session.shown if self.session else None
        found = shown.positions_at(self.places) if shown else self.places
        return np.broadcast_to(found, (axes, self.queries))

    def slots(self, first: int) -> NDArray[np.int64]:
        """(S,) slots of the text from token `first` to `end`, then of the scored candidates."""
        assert self.session is not None
        path = np.array(self.session.path[first : self.end], dtype=np.int64)
        return np.concatenate([path, np.array(self.scored, dtype=np.int64)])

    def mask(self, first: int, window: int | None) -> NDArray[np.bool_]:
        """(n, S) which query sees which of `slots(first)`.

        A token sees the text up to itself, a candidate all of it and itself. window: tokens that
        a layer looks back at most, itself included. Rows of a picture may see later ones of it.
        """
        gap = self.places[:, None] - np.arange(first, self.end)
        seen = gap >= 0
        shown = self.session.shown if self.session else None
        for start, stop in shown.blocks(self.begin, self.end) if shown else ():
            seen[start - self.begin : stop - self.begin, start - first : stop - first] = True
        if window is not None:
            seen &= gap < window
        own = np.eye(self.queries, len(self.scored), self.begin - self.end, dtype=bool)
        return np.concatenate([seen, own], axis=1)


@dataclass(frozen=True)
class JobResult:
    """What the rows of a job had when it was answered; see contract.wire.StepReply.

    logits: (K,) z of all candidates, NaN in rows without values.
    queries: b and q of the rows that ask for them, one row's after the other's, NaN as above.
    pending: rows that have none, and are not refused.
    texts: (T,) z of each row's text, where the job asks for it.
    """

    logits: NDArray[np.float32]
    queries: NDArray[np.float32]
    pending: int
    held: list[int]
    refused: dict[int, RequestError]
    texts: list[NDArray[np.float32]]


@dataclass(slots=True, eq=False)
class Job:
    """One request, and its answer in `future`; to cancel that is to leave nothing behind.

    closed: sessions that are over; found: how many of them there were.
    texts: whether the values of the whole texts are wanted, too; such a job gets all or an error.
    client: whose sessions they are.
    budget: seconds that its caller waits; None: as long as it takes.
    left: nobody waits for its values. It is answered once it has its slots, if it is not yet, and
        its texts are computed until other jobs ask for their sessions.
    queue_seconds, prefill_seconds, compute_seconds: set by the Batcher; the wait for its first
        pass, the passes up to the last one, and the last one.
    """

    rows: Sequence[Row]
    closed: Sequence[str] = ()
    texts: bool = False
    client: str = ""
    budget: float | None = None
    left: bool = False
    found: int = 0
    future: "Future[JobResult]" = field(default_factory=Future)
    submitted: float = 0.0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    compute_seconds: float = 0.0

    @property
    def touched(self) -> set[str]:
        """Sessions that no other job may use at the same time."""
        return {row.name for row in self.rows}.union(self.closed)

    def answer(self) -> JobResult:
        """What there is now. Any thread may ask."""
        logits = [row.logits for row in self.rows]  # before `held`: the engine's thread goes on
        queries = [row.lookahead for row in self.rows if row.lookahead_rank]
        return JobResult(
            _joined(logits),
            _joined(queries),
            sum(row.z is None and not row.refused for row in self.rows),
            [row.held for row in self.rows],
            {i: row.refused for i, row in enumerate(self.rows) if row.refused},
            [row.text_z for row in self.rows if row.text_z is not None],
        )


def _joined(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate([np.empty(0, dtype=np.float32), *parts])
