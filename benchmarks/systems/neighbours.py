"""What guided requests cost the unguided ones beside them, in time between two tokens.

    python -m benchmarks.systems.neighbours

One vLLM of the small real model with the plugin, a value server on the same cores. So many guided
streams and as many unguided neighbours, against twice as many unguided ones, in turns.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from cyclopts import App

from benchmarks.metrics import metrics
from benchmarks.provenance import end
from benchmarks.servers import Models
from benchmarks.systems.streams import Load
from lenvm_vllm.commands.processes import Server
from lenvm_vllm.commands.servers import lenvm_serve, vllm_serve

app = App(help=__doc__)
SETTLE_S = 5.0  # until all streams run


def gaps_ms(vllm: Server, model: str, clients: int, guided: bool, hold_s: float) -> list[float]:
    """Between two tokens of unguided streams, beside `clients` others that are guided or not.

    model: as it is served.
    """
    load = Load(vllm, model)
    with load.running(clients, guided):
        time.sleep(SETTLE_S)
        start = time.perf_counter()
        time.sleep(hold_s)
        stop = time.perf_counter()
    return [1000 * (b - a) for a, b in load.gaps[False] if start <= a and b <= stop]


@app.default
def main(
    *,
    models: Models = Models(),
    clients: int = 8,
    hold_s: float = 30.0,
    rounds: int = 3,
    threads: int = 2,
) -> None:
    """Measure and print one JSON line.

    Parameters
    ----------
    clients
        Unguided neighbours, and as many streams beside them.
    hold_s
        Seconds of each measurement.
    rounds
        Of both, one after the other; ratios are medians over rounds.
    threads
        Of the value server.
    """
    found: dict[bool, list[np.ndarray]] = {False: [], True: []}  # median and 99th percentile
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, logs = models.model, (folder / "values.log", folder / "vllm.log")
        values = lenvm_serve(
            models.checkpoint, logs[0], base_model=models.backbone, threads=threads
        )
        flags = ("--max-num-seqs", 2 * clients, *models.flags)
        vllm = vllm_serve(model, logs[1], *flags, values_url=values.url)
        with values, vllm:
            gaps_ms(vllm, models.name, clients, True, SETTLE_S)  # a first one warms up
            for number in range(2 * rounds):
                guided = number % 2 == 1
                gaps = gaps_ms(vllm, models.name, clients, guided, hold_s)
                median, tail = np.percentile(gaps, (50, 99))
                found[guided].append(np.array((median, tail)))
                line = f"{median:.1f} ms, p99 {tail:.1f} (n {len(gaps)})"
                print(f"{'guided' if guided else 'plain':6} {line}", file=sys.stderr, flush=True)
            told = metrics(vllm.url)
    pairs = zip(found[True], found[False], strict=True)
    median, tail = np.median([a / b for a, b in pairs], axis=0)
    share = told["lenvm_valued_rows_total"] / told["lenvm_rows_total"]
    ratios = {"median_ratio": round(float(median), 3), "p99_ratio": round(float(tail), 3)}
    end({"neighbours": clients, **ratios, "valued_share": round(share, 3)})


if __name__ == "__main__":
    app()
