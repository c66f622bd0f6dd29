"""Does a predicted length shorten the queue? A simulation by measured lengths, times and forecasts.

    python -m benchmarks.systems.queueing --rollouts rollouts.parquet [--checkpoint CHECKPOINT]

Lengths are those of sampled completions, of prompts that the value model was not trained on;
forecasts are a real value server's, and so is the time that each takes. The engine is simulated:
so many texts at a time, a token of each in a step, steps as long as those measured. Prefill is left
out, in all arms alike. As in vLLM, who waits displaces nobody who runs. Arrivals are a Poisson
process, the same in all arms.

fcfs            first come, first served; nothing is asked
prompt length   the shortest prompt first; nothing is asked
forecast        the shortest forecast first, as the plugin does it (`lenvm_vllm/api/forecast.py`)
free forecast   the same if it cost nothing: what the order alone brings
q50, q90        the smallest quantile first: of the lengths that the nearest other prompts had, by
                forecast and prompt length
oracle          the shortest first, by its true length; nothing is asked

What is asked costs: each request waits for its forecast, and by default the engine stands still for
as long, as on cores that both share (--no-shared: it has a device of its own).
"""

import heapq
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
from cyclopts import App, Parameter
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.estimates import Sample, estimate
from benchmarks.provenance import end
from lenvm_vllm.commands.demo import CHECKPOINT, MODEL
from lenvm_vllm.commands.servers import lenvm_serve
from trainer.checks import check, check_positive
from trainer.data import Rollout
from trainer.evaluation.predictors import split_as_trained
from trainer.output import OnlyJson, table
from trainer.rollout_files import read_rollouts
from value_server.contract.checkpoint import read_config
from value_server.contract.wire import PREDICT_PATH

app = App(help=__doc__)
Floats = NDArray[np.float64]
FREE = ("fcfs", "prompt length", "free forecast", "oracle")  # arms that ask for no forecast
QUANTILES = {"q50": 0.5, "q90": 0.9}
ARMS = ("fcfs", "prompt length", "forecast", "free forecast", *QUANTILES, "oracle")
KINDS = ("mean", "median", "p99")
NEIGHBOURS = 20  # prompts whose lengths make a quantile


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Engine:
    """The simulated engine and its load."""

    slots: int = 8
    """Texts at a time; the others wait."""
    at: tuple[int, ...] = (1, 8, 32)
    """Texts at a time for which step_ms is known; between them it is interpolated."""
    step_ms: tuple[float, ...] = (32.0, 46.0, 113.0)
    """Of a step with so many: by default 31, 174 and 282 tokens a second (docs/benchmarks.md)."""
    shared: bool = True
    """Whether the engine stands still for the time of a forecast."""
    aging: float = 10.0
    """Tokens a second by which older requests go first."""

    def check(self) -> None:
        """Raises ValueError naming the option that is wrong."""
        check_positive(slots=self.slots)
        check(len(self.at) == len(self.step_ms), "step_ms", self.step_ms, "one of each of at")
        check(all(ms > 0 for ms in self.step_ms), "step_ms", self.step_ms, "above 0")

    def step_s(self, texts: int) -> float:
        """Seconds of a step with so many texts."""
        return float(np.interp(texts, self.at, self.step_ms)) / 1000

    def rate(self, load: float, mean_length: float) -> float:
        """Requests a second of which so much of the engine is busy."""
        return load * self.slots / (self.step_s(self.slots) * mean_length)

    def latencies(
        self, arrivals: Floats, lengths: NDArray[np.int64], places: Floats, cost_s: Floats
    ) -> Floats:
        """(N,) seconds from each request to its last token.

        arrivals: (N,) seconds, in order. lengths: (N,) tokens. places: (N,), the lowest goes
        first. cost_s: (N,) seconds that each one's forecast takes, of itself or, where the engine
        stands still for it, of all.
        """
        ready = arrivals if self.shared else arrivals + cost_s
        coming = np.argsort(ready, kind="stable")[::-1].tolist()
        waiting: list[tuple[float, int]] = []
        running: dict[int, int] = {}  # request → tokens still to come
        clock, done = 0.0, np.zeros(len(arrivals))
        while coming or waiting or running:
            if not waiting and not running:
                clock = max(clock, ready[coming[-1]])
            while coming and ready[coming[-1]] <= clock:
                request = coming.pop()
                heapq.heappush(waiting, (places[request], request))
                clock += cost_s[request] * self.shared
            while waiting and len(running) < self.slots:
                request = heapq.heappop(waiting)[1]
                running[request] = int(lengths[request])
            step = self.step_s(len(running))
            steps = min(running.values())
            if coming:  # nothing changes before the next one
                steps = min(steps, max(1, int(np.ceil((ready[coming[-1]] - clock) / step))))
            clock += steps * step
            running = {request: left - steps for request, left in running.items()}
            for request in [request for request, left in running.items() if not left]:
                done[request] = clock
                del running[request]
        return done - arrivals


@dataclass(frozen=True)
class Texts:
    """Of N completions: the prompt of each, its tokens, and the tokens of the completion.

    A cut completion counts with its bound, which is what a server with that limit writes.
    """

    prompts: NDArray[np.str_]
    prompt_tokens: Floats
    lengths: NDArray[np.int64]
    forecasts: Floats

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], forecasts: dict[str, float]) -> "Texts":
        """forecasts: of each prompt, in tokens."""
        return cls(
            np.array([r.prompt_id for r in rollouts]),
            np.array([len(r.prompt_ids) for r in rollouts], dtype=np.float64),
            np.array([len(r.completion_ids) for r in rollouts]),
            np.array([forecasts[r.prompt_id] for r in rollouts]),
        )

    def quantiles(self, share: float) -> Floats:
        """(N,) that share of the lengths of the nearest texts of other prompts is not above it."""
        own = np.log(np.column_stack([self.forecasts, self.prompt_tokens]))
        own = (own - own.mean(0)) / np.maximum(own.std(0), 1e-9)
        apart = ((own[:, None] - own[None]) ** 2).sum(-1)
        apart[self.prompts[:, None] == self.prompts[None]] = np.inf
        near = np.argsort(apart, axis=1, kind="stable")[:, :NEIGHBOURS]
        return np.quantile(self.lengths[near], share, axis=1)

    def scores(self, arm: str) -> Floats:
        """(N,) tokens by which an arm orders; 0 of fcfs."""
        if arm in QUANTILES:
            return self.quantiles(QUANTILES[arm])
        if arm in ("forecast", "free forecast"):
            return self.forecasts
        if arm == "prompt length":
            return self.prompt_tokens
        return self.lengths.astype(np.float64) if arm == "oracle" else np.zeros(len(self.lengths))


def simulated(
    lengths: NDArray[np.int64],
    scores: dict[str, Floats],
    cost_s: Floats,
    engine: Engine,
    load: float,
    count: int,
    seed: int,
) -> dict[str, Floats]:
    """(count,) latencies by arm, of the same requests at the same times.

    lengths: (N,) of the texts, of which `count` are drawn. scores: (N,) by arm, see `Texts`.
    """
    chance = np.random.default_rng(seed)
    own, costs = chance.integers(0, len(lengths), count), chance.choice(cost_s, count)
    gaps = chance.exponential(1 / engine.rate(load, float(lengths.mean())), count)
    arrivals = np.cumsum(gaps)
    found = {}
    for arm in ARMS:
        paid = np.zeros(count) if arm in FREE else costs
        places = engine.aging * arrivals + scores[arm][own]
        found[arm] = engine.latencies(arrivals, lengths[own], places, paid)
    return found


def figures(runs: Sequence[dict[str, Floats]], load: float) -> list[dict[str, Any]]:
    """A row for each arm: mean, median and 99th percentile in seconds, and over that of fcfs in the
    same run; intervals of runs. n: requests."""
    names = [str(run) for run in range(len(runs))]
    rows = []
    for arm in ARMS:
        row: dict[str, Any] = {"load": load, "arm": arm}
        for kind in KINDS:
            mine, base = ([_of(kind, run[name]) for run in runs] for name in (arm, "fcfs"))
            row[f"{kind} s"] = estimate(Sample(mine, names))
            ratios = [a / b for a, b in zip(mine, base, strict=True)]
            row[f"{kind} ratio"] = estimate(Sample(ratios, names))
        rows.append(row | {"runs": len(runs), "n": sum(len(run[arm]) for run in runs)})
    return rows


def _of(kind: str, latencies: Floats) -> float:
    """One of KINDS."""
    share = {"median": 50.0, "p99": 99.0}.get(kind)
    return float(latencies.mean() if share is None else np.percentile(latencies, share))


def forecasts_of(
    rollouts: Sequence[Rollout], checkpoint: Path, base_model: str
) -> tuple[dict[str, float], Floats]:
    """Of each prompt the tokens that a value server predicts, and the seconds that it took, one
    request after the other over a kept connection."""
    prompts = {r.prompt_id: [int(i) for i in r.prompt_ids] for r in rollouts}
    found, seconds = {}, []
    with (
        TemporaryDirectory() as folder,
        lenvm_serve(checkpoint, Path(folder) / "values.log", base_model=base_model) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        client.post(PREDICT_PATH, json={"token_ids": [1, 2, 3]}).raise_for_status()  # warm
        for name, ids in tqdm(prompts.items(), desc="forecasts", file=sys.stderr):
            started = time.perf_counter()
            reply = client.post(PREDICT_PATH, json={"token_ids": ids}).raise_for_status()
            seconds.append(time.perf_counter() - started)
            found[name] = float(reply.json()["predicted_tokens"])
    return found, np.array(seconds)


@app.default
def main(
    *,
    rollouts: Path,
    checkpoint: Path = CHECKPOINT,
    base_model: str = str(MODEL),
    engine: Engine = Engine(),
    loads: tuple[float, ...] = (0.7, 0.9, 1.1),
    requests: int = 300,
    seeds: int = 20,
    only_json: OnlyJson = False,
) -> None:
    """Simulate, print a table and, as the last line, one JSON object.

    Parameters
    ----------
    rollouts
        Parquet file of `lenvm rollout`, or a folder of them.
    checkpoint
        Value model that predicts.
    base_model
        Where its backbone lies.
    loads
        Arrivals, as shares of what the engine can do when it is full.
    requests
        Of each run.
    seeds
        Runs of each load.
    """
    engine.check()
    check_positive(requests=requests, seeds=seeds)
    held_out = split_as_trained(read_rollouts(rollouts), read_config(checkpoint), None)[1]
    forecasts, cost_s = forecasts_of(held_out, checkpoint, base_model)
    texts = Texts.of(held_out, forecasts)
    scores, rows = {arm: texts.scores(arm) for arm in ARMS}, []
    for load in loads:
        given = texts.lengths, scores, cost_s, engine, load, requests
        rows += figures([simulated(*given, seed) for seed in range(seeds)], load)
    cost_ms = {f"p{k}": round(1000 * float(np.percentile(cost_s, k)), 2) for k in (50, 99)}
    result = {
        "simulated": True,
        "prompts": len(forecasts),
        "completions": len(held_out),
        "forecast_ms": cost_ms,
        "rows": rows,
    }
    end(result, table(rows), only_json)


if __name__ == "__main__":
    app()
