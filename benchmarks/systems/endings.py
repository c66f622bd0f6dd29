"""What other endings cost in seconds and what they buy, by how many an answer may have, and how
long a stream stops for them.

    python -m benchmarks.systems.endings

A vLLM of the small real model and a value server with the shipped checkpoint. Prompts do not say
a length. All cells of a size have the same prompts and targets, each answer follows the one before
it on one of so many connections, and whole and natural ends are those that the answers report of
themselves: the plugin's own yardstick, by which it also chooses.
"""

import itertools
import json
import shlex
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
from benchmarks.evidence.arms import CHOSEN
from benchmarks.provenance import end
from benchmarks.servers import Models, served
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
    """first, pause: of a stream, seconds to its first text, and the longest between two chunks that
    have text or end it."""

    seconds: float
    target: int
    result: dict[str, Any]
    first: float = 0.0
    pause: float = 0.0

    @property
    def deviation(self) -> float:
        """|L - N| / N in percent."""
        return 100 * abs(self.result["tokens"] - self.target) / self.target


Job = tuple[str, int]  # prompt and tokens


def ask(http: httpx.Client, model: str, most: int, streams: bool, job: Job) -> Answer:
    prompt, target = job
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 1.0,
        "length_target": {"tokens": target, "endings": most},
    }
    started = time.perf_counter()
    if streams:
        return streamed(http, body, target)
    reply = http.post("/chat/completions", json=body).raise_for_status()
    (choice,) = reply.json()["choices"]
    return Answer(time.perf_counter() - started, target, choice["length_result"])


def streamed(http: httpx.Client, body: dict[str, Any], target: int) -> Answer:
    times = [time.perf_counter()]
    result: dict[str, Any] = {}
    with http.stream("POST", "/chat/completions", json=body | {"stream": True}) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            result = choice.get("length_result", result)
            if choice["delta"].get("content") or result:
                times.append(time.perf_counter())
    first, *gaps = (later - now for now, later in itertools.pairwise(times))
    return Answer(times[-1] - times[0], target, result, first, max(gaps, default=0.0))


def answered(
    endpoint: Endpoint, jobs: Sequence[Job], size: int, most: int, streams: bool
) -> tuple[list[Answer], float]:
    """All answers, so many asked at a time, and the seconds of the whole."""
    with httpx.Client(base_url=endpoint.url, timeout=600) as http, ThreadPoolExecutor(size) as pool:
        started = time.perf_counter()
        answers = list(pool.map(partial(ask, http, endpoint.model, most, streams), jobs))
        return answers, time.perf_counter() - started


def row_of(
    size: int, most: int, streams: bool, answers: Sequence[Answer], seconds: float
) -> dict[str, Any]:
    times, firsts, pauses = (
        sorted(getattr(answer, name) for answer in answers)
        for name in ("seconds", "first", "pause")
    )
    results = [answer.result for answer in answers]
    tokens = sum(result["tokens"] for result in results)

    def share(*ends: str) -> float:
        return 100 * sum(result["end"] in ends for result in results) / len(results)

    return {
        "at a time": size,
        "": "stream" if streams else "whole",
        "endings": most,
        "p50 s": statistics.median(times),
        "p95 s": most_of(times),
        "first s": statistics.median(firsts),
        "pause p50": statistics.median(pauses),
        "pause p95": most_of(pauses),
        "tokens/s": tokens / seconds,
        "sampled": sum(result["sampled_tokens"] for result in results) / tokens,
        "natural %": share("natural"),
        "whole %": share("natural", "whole"),
        "LD %": statistics.fmean(answer.deviation for answer in answers),
        "chosen by": CHOSEN if most > 1 else "",
        "n": len(answers),
    }


def most_of(times: Sequence[float]) -> float:
    """What 95 of 100 do not exceed; of sorted ones."""
    return times[round(0.95 * (len(times) - 1))]


@app.default
def main(
    *,
    models: Models = Models(),
    concurrency: tuple[int, ...] = (1, 8, 32),
    endings: tuple[int, ...] = (1, 4, 8, 16),
    streams: tuple[bool, ...] = (False, True),
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
    streams
        Whether answers are streams; those that are none have no first text and no pause.
    targets
        Tokens, in turn.
    requests
        Of each cell, but no fewer than twice the concurrency; of one at a time half as many.
    """
    if models.base_model:
        raise ValueError(f"base_model {models.base_model}: not taken here, the backbone is `model`")
    rows, most_open = [], max(32, *concurrency)
    name, given = str(models.model), shlex.split(models.vllm_flags)
    with (
        tempfile.TemporaryDirectory() as folder,
        served(
            name, models.checkpoint, Path(folder), concurrency=most_open, more=given
        ) as endpoint,
    ):
        for size in concurrency:
            count = max(requests // 2 if size == 1 else requests, 2 * size)
            texts = itertools.cycle(PROMPTS + PROMPTS_MORE)
            jobs = [
                (f"{next(texts)} ({number})", targets[number % len(targets)])
                for number in range(count)
            ]
            answered(endpoint, jobs[:size], size, 1, False)  # a first round, not measured
            for most, stream in itertools.product(endings, streams):
                answers, seconds = answered(endpoint, jobs, size, most, stream)
                rows.append(row_of(size, most, stream, answers, seconds))
                print(rows[-1], file=sys.stderr, flush=True)
    cells = {f"{row['at a time']}/{row['endings']}/{row['']}": row for row in rows}
    names = list(rows[0])[3:-2]
    result: dict[str, Any] = {
        k: {n: round(row[n], 2) for n in names} | {n: row[n] for n in ("chosen by", "n")}
        for k, row in cells.items()
    }
    end(result, table(rows))


if __name__ == "__main__":
    app()
