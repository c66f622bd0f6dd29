"""Times between tokens, and how those under a fault compare with healthy ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from benchmarks.systems.streams import Span

ENOUGH = 300  # gaps: the 99th percentile of fewer is one of the two longest


@dataclass(frozen=True)
class Latency:
    """Of n gaps, in milliseconds."""

    n: int
    p50: float
    p99: float
    worst: float

    @classmethod
    def of(cls, gaps: Sequence[Span]) -> Self | None:
        """None without any."""
        if not gaps:
            return None
        ms = 1e3 * np.diff(np.asarray(gaps))[:, 0]
        p50, p99 = np.percentile(ms, (50, 99))
        return cls(len(ms), *(round(float(value), 1) for value in (p50, p99, ms.max())))


def within(gaps: Sequence[Span], during: Sequence[Span], without: Sequence[Span]) -> list[Span]:
    """Those that touch one of `during`, and none of `without`."""
    return [gap for gap in gaps if _touches(gap, during) and not _touches(gap, without)]


def _touches(gap: Span, spans: Sequence[Span]) -> bool:
    return any(gap[0] < end and begin < gap[1] for begin, end in spans)
