"""Who waits, and what becomes of guided texts, when everything around them fails?

    python -m benchmarks.systems.faults

A vLLM of the small real model and a value server with the shipped checkpoint, each on cores of its
own, under a load of streams: guided ones, and as many unguided neighbours. One fault after the
other, with healthy times between them, which are what the latencies are compared with. After each
fault the time is taken until a step has values again. Starting a server takes the time of the
others on a small machine: gaps between tokens do not count meanwhile.

A request that a restart of vLLM cuts off is sent again, as any client would; it is lost if it never
gets its answer. The last line is one JSON object.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from cyclopts import App

from benchmarks.provenance import KEY, end, provenance
from benchmarks.systems.fault_summary import Observed, Window, few, lines
from benchmarks.systems.latency import ENOUGH
from benchmarks.systems.stage import Stage, stage_of
from benchmarks.systems.troubles import FAULTS, Disturb
from trainer.output import table

app = App(help=__doc__)

EVERY = 4  # faults from one healthy time to the next
SETTLE_S = 2.0  # behind a fault


def watched(
    stage: Stage,
    disturb: Disturb | None,
    hold_s: float,
    fault: str | None = None,
    only: str | None = None,
) -> Window:
    """What happens while it is disturbed, and until there are values again. fault, only: as of
    `Window`."""
    begin = time.perf_counter()
    with disturb(stage) if disturb else nullcontext():
        before = stage.counts()
        time.sleep(hold_s)
        after = stage.counts()
    recovery_s = stage.recovery_s() if fault else None
    span = begin, time.perf_counter()
    time.sleep(SETTLE_S)
    told = fault or f"healthy {only or ''}"
    print(f"{told}: {span[1] - begin:.0f} s", file=sys.stderr, flush=True)
    rows, valued = (b - a for a, b in zip(before, after, strict=True))
    timed = fault is None or FAULTS[fault].timed
    return Window(span, fault, only, timed, rows, valued, recovery_s)


def windows_of(stage: Stage, names: Sequence[str], hold_s: float) -> Iterator[Window]:
    """The faults of these names in turn, and healthy times before, between and after them."""
    stage.recovery_s()
    time.sleep(SETTLE_S)
    for number, name in enumerate(names):
        fault = FAULTS[name]
        if number % EVERY == 0:
            yield watched(stage, None, hold_s)
        if fault.beside:
            yield watched(stage, fault.beside, fault.hold * hold_s, only=name)
        yield watched(stage, fault.disturb, fault.hold * hold_s, fault=name)
    yield watched(stage, None, hold_s)


@app.default
def main(
    *,
    faults: tuple[str, ...] = tuple(FAULTS),
    rounds: int = 1,
    hold_s: float = 20.0,
    clients: int = 3,
    out: Path | None = None,
) -> None:
    """Fail, recover, and end with one JSON line.

    Parameters
    ----------
    faults
        Names of them, in their order; by default all.
    rounds
        Of all of them.
    hold_s
        Seconds that a fault lasts, and a healthy time.
    clients
        Guided streams at a time, and as many unguided ones.
    out
        File for the figures of each fault, as JSON.
    """
    if unknown := [name for name in faults if name not in FAULTS]:
        raise ValueError(f"faults: {unknown[0]!r}, must be of {', '.join(FAULTS)}")
    with tempfile.TemporaryDirectory() as name, stage_of(Path(name), clients) as stage:
        load = stage.load
        with load.running(clients):
            windows = list(windows_of(stage, faults * rounds, hold_s))
        observed = Observed(windows, load.answers, load.gaps, stage.asides)
        counts = {"resent": load.counts["resent"], "engine_deaths": stage.deaths()}
    rows, result = observed.rows(), observed.result() | counts
    if out:
        out.write_text(
            json.dumps({"result": result, "rows": rows, KEY: provenance()}, indent=1) + "\n"
        )
    print(table(lines(rows)))
    if names := few(rows, ENOUGH):
        print(f"p99 of fewer than {ENOUGH} gaps: {', '.join(names)}")
    end(result)


if __name__ == "__main__":
    app()
