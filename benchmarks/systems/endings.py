"""What other endings cost in seconds and what they buy, by how many an answer may have.

    python -m benchmarks.systems.endings

A vLLM of the small real model and a value server with the shipped checkpoint. Prompts do not say
a length. All cells of a size have the same prompts and targets, each answer follows the one before
it on one of so many connections, and whole and natural ends are those that the answers report of
themselves: the plugin's own yardstick, by which it also chooses.
"""

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from cyclopts import App

from benchmarks.endpoint import Endpoint
from benchmarks.provenance import end
from benchmarks.servers import served
from lenvm_vllm.commands.demo import CHECKPOINT, MODEL
from lenvm_vllm.commands.demo.questions import PROMPTS
from trainer.output import table

app = App(help=__doc__)
PROMPTS_MORE = (
    "What makes bread rise?",
    "Write a letter to a friend who has moved to another city.",
    "Why is the sky blue?",
    "Describe how a small town changes in winter.",
)


@dataclass(frozen=True)
class Answer:
    seconds: float
    target: int
    result: dict[str, Any]

    @property
    def deviation(self) -> float:
        """|L - N| / N in percent."""
        return 100 * abs(self.result["tokens"] - self.target) / self.target


Job = tuple[str, int]  # prompt and tokens


def ask(http: httpx.Client, model: str, most: int, job: Job) -> Answer:
    started = time.perf_counter()
    prompt, target = job
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 1.0,
        "length_target": {"tokens": target, "endings": most},
    }
    reply = http.post("/chat/completions", json=body).raise_for_status()
    (choice,) = reply.json()["choices"]
    return Answer(time.perf_counter() - started, target, choice["length_result"])


def answered(
    endpoint: Endpoint, jobs: Sequence[Job], size: int, most: int
) -> tuple[list[Answer], float]:
    """All answers, so many asked at a time, and the seconds of the whole."""
    with httpx.Client(base_url=endpoint.url, timeout=600) as http, ThreadPoolExecutor(size) as pool:
        started = time.perf_counter()
        answers = list(pool.map(partial(ask, http, endpoint.model, most), jobs))
        return answers, time.perf_counter() - started


def row_of(size: int, most: int, answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    times = sorted(answer.seconds for answer in answers)
    results = [answer.result for answer in answers]
    tokens = sum(result["tokens"] for result in results)

    def share(*ends: str) -> float:
        return 100 * sum(result["end"] in ends for result in results) / len(results)

    return {
        "at a time": size,
        "endings": most,
        "p50 s": statistics.median(times),
        "p95 s": times[min(len(times) - 1, round(0.95 * (len(times) - 1)))],
        "tokens/s": tokens / seconds,
        "sampled": sum(result["sampled_tokens"] for result in results) / tokens,
        "natural %": share("natural"),
        "whole %": share("natural", "whole"),
        "LD %": statistics.fmean(answer.deviation for answer in answers),
        "n": len(answers),
    }


@app.default
def main(
    *,
    concurrency: tuple[int, ...] = (1, 8, 32),
    endings: tuple[int, ...] = (1, 4, 8, 16),
    targets: tuple[int, ...] = (40, 80, 160),
    requests: int = 48,
) -> None:
    """Measure, print a table and one JSON line.

    Parameters
    ----------
    concurrency
        Requests at a time.
    endings
        That an answer may have at most.
    targets
        Tokens, in turn.
    requests
        Of each cell, but no fewer than twice the concurrency; of one at a time half as many.
    """
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        served(str(MODEL), CHECKPOINT, Path(folder), concurrency=max(concurrency)) as endpoint,
    ):
        for size in concurrency:
            count = max(requests // 2 if size == 1 else requests, 2 * size)
            texts = itertools.cycle(PROMPTS + PROMPTS_MORE)
            jobs = [
                (f"{next(texts)} ({number})", targets[number % len(targets)])
                for number in range(count)
            ]
            answered(endpoint, jobs[:size], size, 1)  # a first round, not measured
            for most in endings:
                answers, seconds = answered(endpoint, jobs, size, most)
                rows.append(row_of(size, most, answers, seconds))
                print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows))
    cells = {f"{row['at a time']}/{row['endings']}": row for row in rows}
    names = ("p50 s", "p95 s", "tokens/s", "sampled", "natural %", "whole %", "LD %")
    end({k: {n: round(row[n], 2) for n in names} for k, row in cells.items()})


if __name__ == "__main__":
    app()
