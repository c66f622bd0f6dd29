"""What a run of the faults says: a row for each, and one result for all."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.systems.latency import Latency, within
from benchmarks.systems.streams import Answer, Span

KINDS = {"guided": True, "neighbour": False}  # of streams
ENDS = {"whole": True, "whole_steered": False}  # whether the end came without values


@dataclass(frozen=True)
class Window:
    """A time of the run. fault: None of a healthy time. only: the fault that a healthy time is
    for; None: all others. timed: whether its latencies count.

    rows, valued: guided rows that asked for values, and those that had them. recovery_s: from the
    fault's end until there were values.
    """

    span: Span
    fault: str | None = None
    only: str | None = None
    timed: bool = True
    rows: float = 0.0
    valued: float = 0.0
    recovery_s: float | None = None


@dataclass(frozen=True)
class Observed:
    """All of a run. gaps: by whether the stream was guided. asides: times that do not count."""

    windows: Sequence[Window]
    answers: Sequence[Answer]
    gaps: Mapping[bool, Sequence[Span]]
    asides: Sequence[Span]

    def rows(self) -> list[dict[str, Any]]:
        """Of healthy times, all together and those for one fault, and of each fault."""
        kinds = dict.fromkeys((window.fault, window.only) for window in self.windows)
        return [self._row(fault, only) for fault, only in kinds]

    def _row(self, fault: str | None, only: str | None) -> dict[str, Any]:
        windows = [w for w in self.windows if (w.fault, w.only) == (fault, only)]
        answers = [a for a in self.answers if any(_ended_in(a, window) for window in windows)]
        choosy = [answer for answer in answers if answer.choosy]
        back = [w.recovery_s for w in windows if w.recovery_s is not None]
        return {
            "fault": fault or f"healthy{f', {only}' if only else ''}",
            "requests": len(answers),
            "lost": sum(answer.reason is None for answer in answers),
            "outside_rails": sum(not answer.inside for answer in answers),
            "values": _share(sum(w.valued for w in windows), sum(w.rows for w in windows)),
            "steered": self._steered(windows),
            **{name: _wholes(choosy, blind) for name, blind in ENDS.items()},
            **{kind: self._latency(windows, kind, fault, only) for kind in KINDS},
            "back_s": [round(seconds, 2) for seconds in back],
        }

    def _steered(self, windows: Sequence[Window]) -> float | None:
        """Share of the load's guided tokens that had values."""
        known = [
            known
            for answer in self.answers
            if not answer.extra
            for at, known in answer.valued
            if any(begin <= at < end for begin, end in (w.span for w in windows))
            and not any(begin <= at < end for begin, end in self.asides)
        ]
        return _share(sum(known), len(known))

    def _latency(
        self, windows: Sequence[Window], kind: str, fault: str | None, only: str | None
    ) -> dict[str, Any] | None:
        """Of one kind of streams; of a fault with its ratios to the healthy times."""
        spans = [window.span for window in windows if window.timed]
        latency = Latency.of(within(self.gaps[KINDS[kind]], spans, self.asides))
        if latency is None:
            return None
        base = self._healthy(kind, fault) if fault else None
        if base is None:
            return asdict(latency)
        return asdict(latency) | {
            "p99_ratio": round(latency.p99 / base.p99, 2),
            "worst_ratio": round(latency.worst / base.p99, 2),
        }

    def _healthy(self, kind: str, fault: str) -> Latency | None:
        """What a fault is compared with: its own healthy time, or where it has none all others."""
        healthy = [window for window in self.windows if window.fault is None]
        own = [window.span for window in healthy if window.only == fault]
        spans = own or [window.span for window in healthy if window.only is None]
        return Latency.of(within(self.gaps[KINDS[kind]], spans, self.asides))

    def result(self) -> dict[str, Any]:
        """Of the whole run; None where nothing of the kind was seen."""
        rows = self.rows()
        healthy = next(row for row in rows if row["fault"] == "healthy")
        back = [w.recovery_s for w in self.windows if w.recovery_s is not None]
        return {
            "requests": len(self.answers),
            "lost": sum(answer.reason is None for answer in self.answers),
            "outside_rails": sum(not answer.inside for answer in self.answers),
            "faults": len(back),
            "recovery_s_p95": round(float(np.percentile(back, 95)), 2) if back else None,
            "neighbour_itl_p99_ratio_worst": _worst(rows, ["neighbour"], "p99_ratio"),
            "guided_itl_p99_ratio_worst": _worst(rows, ["guided"], "p99_ratio"),
            "worst_gap_ratio": _worst(rows, list(KINDS), "worst_ratio"),
            "healthy_itl_p99_ms": self._drift(),
            "steps_with_values": healthy["values"],
            **{name: _all_wholes(rows, name) for name in ENDS},
        }

    def _drift(self) -> list[float]:
        """The neighbours' 99th percentile in each healthy time: how far two of the same differ."""
        healthy = [w.span for w in self.windows if w.fault is None and w.only is None]
        gaps = self.gaps[KINDS["neighbour"]]
        found = [Latency.of(within(gaps, [span], self.asides)) for span in healthy]
        return [latency.p99 for latency in found if latency]


def lines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows as a table shows them."""
    return [
        {
            **{name: row[name] for name in ("fault", "requests", "lost", "outside_rails")},
            **{name: row[name] for name in ("values", "steered")},
            **{name: "/".join(map(str, row[name])) for name in ENDS},
            **{f"{kind} ms": _told(row[kind]) for kind in KINDS},
            **{f"{kind} ratios": _ratios(row[kind]) for kind in KINDS},
            "back s": ", ".join(map(str, row["back_s"])),
        }
        for row in rows
    ]


def few(rows: Sequence[Mapping[str, Any]], enough: int) -> list[str]:
    """Names of those in which a p99 rests on fewer gaps."""
    return [row["fault"] for row in rows if any(row[k] and row[k]["n"] < enough for k in KINDS)]


def _told(latency: Mapping[str, Any] | None) -> str:
    if latency is None:
        return ""
    p50, p99, worst = (round(latency[name]) for name in ("p50", "p99", "worst"))
    return f"{p50} / {p99} / {worst} (n {latency['n']})"


def _ratios(latency: Mapping[str, Any] | None) -> str:
    if latency is None or "p99_ratio" not in latency:
        return ""
    return f"{latency['p99_ratio']} / {latency['worst_ratio']}"


def _wholes(answers: Sequence[Answer], blind: bool) -> tuple[int, int]:
    """How many of those that ended without values, or with them, ended whole; of how many."""
    ended = [answer for answer in answers if answer.blind == blind]
    return sum(answer.whole for answer in ended), len(ended)


def _all_wholes(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return _share(sum(row[name][0] for row in rows), sum(row[name][1] for row in rows))


def _ended_in(answer: Answer, window: Window) -> bool:
    return window.span[0] <= answer.ended < window.span[1]


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 3) if whole else None


def _worst(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str], name: str) -> float | None:
    ratios = [row[kind].get(name) for row in rows for kind in kinds if row[kind]]
    return max((value for value in ratios if value is not None), default=None)
