"""Limits of characters under bad weather: none may be passed, by no character.

    python -m benchmarks.systems.limits

A vLLM of the small real model, whose value server is killed and started again and again. Prompts
are in four scripts, half of the requests are streams, and every second limit is to be met exactly.
What is counted is the text that the client has, by Python's own `len`.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
from cyclopts import App
from tqdm import tqdm

from benchmarks.provenance import end
from benchmarks.systems.disturb import killed, meanwhile
from lenvm_vllm.commands.demo import CHECKPOINT, MODEL, NAME
from lenvm_vllm.commands.processes import Server
from lenvm_vllm.commands.servers import lenvm_serve, vllm_serve
from trainer.output import table

app = App(help=__doc__)

PROMPTS = {
    "Latin": ("Write about a walk in the forest.", "Explain how a bicycle stays upright."),
    "Chinese": ("请用中文介绍一下北京的历史。", "写一首关于春天的诗。"),
    "Arabic": ("اكتب باللغة العربية عن البحر والسماء.", "اكتب رسالة قصيرة إلى صديق."),
    "Thai, emoji": ("เขียนเรื่องสั้นเกี่ยวกับแมว", "Answer in emoji only: 👩‍👩‍👧 🏳️‍🌈 🤷🏽‍♂️ ☕"),
}
# What the answers begin with, so that a small model stays in its script.
STARTS = {"Latin": "The", "Chinese": "北京", "Arabic": "في", "Thai, emoji": "แมว 😀"}


Job = tuple[str, dict[str, Any]]  # script and request


@dataclass(frozen=True)
class Answer:
    script: str
    asked: dict[str, Any]
    text: str
    steered: float  # share of its tokens

    @property
    def is_above(self) -> bool:
        return len(self.text) > self.asked["characters"]

    @property
    def is_inexact(self) -> bool:
        return self.asked["mode"] == "equal_to" and len(self.text) != self.asked["characters"]


def jobs(count: int, least: int, most: int) -> list[Job]:
    rng = random.Random(0)
    made: list[Job] = []
    for number in range(count):
        script = list(PROMPTS)[number // 4 % len(PROMPTS)]
        exact = number % 2 == 0
        wish = {"characters": rng.randint(least, most), "mode": "equal_to" if exact else "at_most"}
        prompt = f"{rng.choice(PROMPTS[script])}\n\n{STARTS[script]}"
        body = {
            "model": NAME,
            "prompt": prompt,
            "stream": number % 4 < 2,
            "temperature": 1.0,
            "max_tokens": 1500,
            "length_target": wish | ({"tolerance": 0} if exact else {}),
        }
        made.append((script, body))
    return made


def ask(http: httpx.Client, job: Job) -> Answer:
    script, body = job
    reply = http.post("/v1/completions", json=body).raise_for_status()
    if body["stream"]:
        lines = (line.removeprefix("data: ") for line in reply.text.split("\n") if line)
        chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    else:
        chunks = [reply.json()]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice["text"] for choice in choices)
    result = choices[-1]["length_result"]
    steered = (result["steered_steps"] or 0) / (result["steps"] or 1)
    return Answer(script, body["length_target"], text, steered)


def answered(url: str, wanted: Sequence[Job], size: int) -> list[Answer]:
    """All answers, so many asked at a time."""
    with httpx.Client(base_url=url, timeout=900) as http, ThreadPoolExecutor(size) as threads:
        answers = threads.map(partial(ask, http), wanted)
        return list(tqdm(answers, total=len(wanted), file=sys.stderr))


@dataclass
class Weather:
    """The value server is there and gone in turn, `hold` seconds each."""

    values: Server
    hold: float
    kills: int = 0

    def turn(self) -> None:
        time.sleep(self.hold)
        with killed(self.values):
            self.kills += 1
            time.sleep(self.hold)


def row_of(script: str, answers: Sequence[Answer]) -> dict[str, Any]:
    most = [answer for answer in answers if answer.asked["mode"] == "at_most"]
    used = [len(answer.text) / answer.asked["characters"] for answer in most]
    characters = "".join(answer.text for answer in answers)
    return {
        "script": script,
        "n": len(answers),
        "not ASCII %": 100 * sum(c > "\x7f" for c in characters) / len(characters),
        "tokens steered %": 100 * sum(answer.steered for answer in answers) / len(answers),
        "above": sum(answer.is_above for answer in answers),
        "inexact": sum(answer.is_inexact for answer in answers),
        "of at_most used %": 100 * fmean(used) if used else None,
    }


@app.default
def main(
    *, requests: int = 1000, least: int = 20, most: int = 400, concurrency: int = 16, hold: int = 15
) -> None:
    """Ask, print a table and one JSON line; exit code 1 if a limit was passed or missed.

    Parameters
    ----------
    requests
        In all.
    least, most
        Characters, between which the limits are.
    concurrency
        Requests at a time.
    hold
        Seconds between two changes of the value server: gone, there, gone, …
    """
    with tempfile.TemporaryDirectory() as name:
        values = lenvm_serve(CHECKPOINT, Path(name) / "values.log", base_model=MODEL)
        flags = ("--served-model-name", NAME, "--max-num-seqs", concurrency)
        vllm = vllm_serve(MODEL, Path(name) / "vllm.log", *flags, values_url=values.url)
        weather = Weather(values, hold)
        with values, vllm, meanwhile(weather.turn):
            answers = answered(vllm.url, jobs(requests, least, most), concurrency)
    scripts = {script: [a for a in answers if a.script == script] for script in PROMPTS}
    print(table([row_of(script, found) for script, found in scripts.items() if found]))
    line = {
        "requests": len(answers),
        "above": sum(answer.is_above for answer in answers),
        "inexact": sum(answer.is_inexact for answer in answers),
        "kills": weather.kills,
    }
    end(line)
    sys.exit(1 if line["above"] or line["inexact"] else 0)


if __name__ == "__main__":
    app()
