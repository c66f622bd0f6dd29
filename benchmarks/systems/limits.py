"""Limits of characters under bad weather: none may be passed, by no character.

    python -m benchmarks.systems.limits

A vLLM of the small real model, whose value server is killed and started again and again. Prompts
are in four scripts, half of the requests are streams, and every second limit is to be met exactly.
What is counted is the text that the client has, by Python's own `len`.
"""

import asyncio
import json
import random
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cyclopts import App

from benchmarks.endpoint import Endpoint
from benchmarks.systems.faults import Server
from lenvm_vllm.commands.demo import CHECKPOINT, MODEL, native_dtype
from lenvm_vllm.commands.processes import VALUE_SERVER, VLLM_SERVE, free_port, running
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
            "prompt": prompt,
            "stream": number % 4 < 2,
            "temperature": 1.0,
            "max_tokens": 1500,
            "length_target": wish | ({"tolerance": 0} if exact else {}),
        }
        made.append((script, body))
    return made


async def ask(http: httpx.AsyncClient, model: str, script: str, body: dict[str, Any]) -> Answer:
    reply = await http.post("/completions", json=body | {"model": model})
    reply.raise_for_status()
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


async def load(endpoint: Endpoint, wanted: Sequence[Job], size: int) -> list[Answer]:
    waiting = iter(wanted)
    answers: list[Answer] = []

    async def connection(http: httpx.AsyncClient) -> None:
        for script, body in waiting:
            answers.append(await ask(http, endpoint.model, script, body))
            if len(answers) % 50 == 0:
                print(f"{len(answers)} of {len(wanted)}", file=sys.stderr, flush=True)

    async with httpx.AsyncClient(base_url=endpoint.url, timeout=900) as http:
        await asyncio.gather(*[connection(http) for _ in range(size)])
    return answers


async def weather(values: Server, hold: float) -> int:
    """Kill the value server and start it again for ever; the number of kills when cancelled."""
    kills = 0
    try:
        while True:
            await asyncio.sleep(hold)
            await asyncio.to_thread(values.signal, signal.SIGKILL)
            await asyncio.to_thread(values.stop)
            kills += 1
            await asyncio.sleep(hold)
            await asyncio.to_thread(values.start)
    except asyncio.CancelledError:
        return kills


async def under_weather(
    endpoint: Endpoint, values: Server, wanted: Sequence[Job], size: int, hold: float
) -> tuple[list[Answer], int]:
    """All answers, and how often the value server was killed."""
    meanwhile = asyncio.create_task(weather(values, hold))
    answers = await load(endpoint, wanted, size)
    meanwhile.cancel()
    return answers, await meanwhile


@contextmanager
def stage(folder: Path, concurrency: int) -> Iterator[tuple[Endpoint, Server]]:
    """A vLLM, and its value server."""
    port, values_port = free_port(), free_port()
    url, values_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{values_port}"
    command = [
        *(*VALUE_SERVER, str(CHECKPOINT), "--base-model", str(MODEL), "--threads", "1"),
        *("--port", str(values_port)),
    ]
    values = Server(command, f"{values_url}/ready", folder / "values.log")
    vllm = [
        *(*VLLM_SERVE, str(MODEL), "--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", "2048", "--max-num-seqs", str(concurrency), "--enforce-eager"),
        *("--dtype", native_dtype(), "--logits-processors", "lenvm_vllm"),
    ]
    env = {"LENVM_URL": values_url, "VLLM_CPU_KVCACHE_SPACE": "1"}
    values.start()
    try:
        with running(vllm, f"{url}/health", folder / "vllm.log", env):
            yield Endpoint(f"{url}/v1", str(MODEL), concurrency), values
    finally:
        values.stop()


def row_of(script: str, answers: Sequence[Answer]) -> dict[str, Any]:
    most = [answer for answer in answers if answer.asked["mode"] == "at_most"]
    characters = "".join(answer.text for answer in answers)
    return {
        "script": script,
        "n": len(answers),
        "not ASCII %": 100 * sum(c > "\x7f" for c in characters) / len(characters),
        "tokens steered %": 100 * sum(answer.steered for answer in answers) / len(answers),
        "above": sum(answer.is_above for answer in answers),
        "inexact": sum(answer.is_inexact for answer in answers),
        "of at_most used %": 100
        * sum(len(answer.text) / answer.asked["characters"] for answer in most)
        / len(most),
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
    wanted = jobs(requests, least, most)
    with (
        tempfile.TemporaryDirectory() as name,
        stage(Path(name), concurrency) as (endpoint, values),
    ):
        answers, kills = asyncio.run(under_weather(endpoint, values, wanted, concurrency, hold))
    scripts = {script: [a for a in answers if a.script == script] for script in PROMPTS}
    print(table([row_of(script, found) for script, found in scripts.items() if found]))
    line = {
        "requests": len(answers),
        "above": sum(answer.is_above for answer in answers),
        "inexact": sum(answer.is_inexact for answer in answers),
        "kills": kills,
    }
    print(json.dumps(line))
    sys.exit(1 if line["above"] or line["inexact"] else 0)


if __name__ == "__main__":
    app()
