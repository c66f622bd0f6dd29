"""What the engine is asked and what it answers.

Legend: K candidates, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from value_server.engine.scheduler import JobRow


class StepRow(NamedTuple):
    """One session's part of a request; see contract.wire.StepRequest."""

    session: str
    start: int
    tokens: Sequence[int]
    candidates: Sequence[int] = ()


@dataclass(slots=True, eq=False)
class Job:
    """One request.

    texts: whether the values of the whole texts are wanted, too.
    client: whose sessions they are.
    rows: one for each of `steps`, filled in by `admit`; None is unknown.
    found: how many of the sessions to close there were.
    queue_seconds, prefill_seconds, compute_seconds: set by the Batcher; the wait for its first
        pass, the passes up to the last one, and the last one.
    """

    steps: Sequence[StepRow]
    closed: Sequence[str] = ()
    texts: bool = False
    client: str = ""
    rows: list[JobRow | None] = field(default_factory=list)
    found: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    compute_seconds: float = 0.0

    def only(self, rows: Sequence[int], closed: Sequence[str]) -> "Job":
        """A job of these rows, and of these sessions to close."""
        return Job([self.steps[row] for row in rows], closed, self.texts, self.client)

    def follow(self, part: "Job") -> None:
        """A part of this job is done: its figures, where they are larger, are those of the job."""
        self.found += part.found if part is not self else 0
        self.queue_seconds = max(self.queue_seconds, part.queue_seconds)
        self.prefill_seconds = max(self.prefill_seconds, part.prefill_seconds)
        self.compute_seconds = max(self.compute_seconds, part.compute_seconds)

    @property
    def touched(self) -> set[str]:
        """Sessions that no other job may use at the same time."""
        return {step.session for step in self.steps}.union(self.closed)


@dataclass(frozen=True)
class JobResult:
    """logits: (K,) z of the candidates, NaN in unknown rows; unknown: their indices.

    texts: (T,) z of each row's text, where the job asks for it.
    """

    logits: NDArray[np.float32]
    unknown: list[int]
    texts: list[NDArray[np.float32]]
