"""What becomes of guided requests when everything around them fails?

    python -m benchmarks.systems.faults

A real vLLM and a real value server, of tiny random models, under a load of guided requests, and
one fault after the other: the value server is killed, restarted, paused, starved of CPU, its pool
filled by others; answers come late, in single bytes, with flipped bits or half; vLLM is restarted.
After each the time is taken until a step is steered again. A request that a restart of vLLM cuts
off is sent again, as any client would; it is lost if it never gets its answer.
"""

import contextlib
import itertools
import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from cyclopts import App
from tqdm import tqdm

from benchmarks.metrics import metrics
from benchmarks.systems.disturb import killed, meanwhile, paused
from benchmarks.systems.proxy import Proxy
from benchmarks.systems.steps import step_request
from benchmarks.systems.timing import wait_until
from lenvm_vllm.commands.processes import Server, free_port
from lenvm_vllm.commands.servers import lenvm_serve, vllm_serve
from lenvm_vllm.target.rails import rails_of
from lenvm_vllm.target.request import LengthTarget
from tests.support.tiny import tiny_checkpoint
from tests.support.tiny_llm import tiny_llm
from value_server.contract import wire
from value_server.engine.job import Row

app = App(help=__doc__)

WISHES: tuple[dict[str, Any], ...] = (
    {"tokens": 60, "tolerance": 0.0},
    {"tokens": 80},
    {"mode": "at_most", "tokens": 50},
    {"mode": "at_least", "tokens": 70},
    {"mode": "range", "min_tokens": 40, "max_tokens": 60},
)
MAX_TOKENS = 200
SLOTS = 4000
PATIENCE_S = 180.0  # longer than anything here takes


class Load:
    """Guided requests, `clients` at a time, until it is finished; what became of them."""

    def __init__(self, vllm: Server, clients: int) -> None:
        self.counts: Counter[str] = Counter()
        self._stop = threading.Event()
        self._vllm = vllm
        threads = ThreadPoolExecutor(clients)
        self._work = [threads.submit(self._run, random.Random(i)) for i in range(clients)]

    def finish(self) -> None:
        """Let the last requests end. Raises what a client has raised."""
        self._stop.set()
        for work in self._work:
            work.result()

    def _run(self, draw: random.Random) -> None:
        with httpx.Client(base_url=self._vllm.url, timeout=PATIENCE_S) as http:
            while not self._stop.is_set():
                wish = draw.choice(WISHES)
                body = {"model": "tiny", "prompt": f"{draw.random()}", "max_tokens": MAX_TOKENS}
                reply = self._ask(http, body | {"length_target": wish})
                self.counts["requests"] += 1
                if reply is None or reply.status_code != 200:
                    self.counts["lost"] += 1
                elif not _inside(reply.json()["usage"]["completion_tokens"], wish):
                    self.counts["outside_rails"] += 1

    def _ask(self, http: httpx.Client, body: dict[str, Any]) -> httpx.Response | None:
        """The answer. One that fails without a restart of vLLM is the last word."""
        while True:
            wait_until(lambda: self._vllm.up, PATIENCE_S)
            reply, process = None, self._vllm.process
            with contextlib.suppress(httpx.TransportError):
                reply = http.post("/v1/completions", json=body)
                if reply.status_code == 200:
                    return reply
            if self._vllm.up and self._vllm.process is process:
                return reply
            self.counts["resent"] += 1


def _inside(tokens: int, wish: dict[str, Any]) -> bool:
    rails = rails_of(LengthTarget.parse(wish))
    return rails.first <= tokens <= (rails.last or MAX_TOKENS)


@dataclass
class Stage:
    """All that can fail: vLLM → proxy → value server."""

    vllm: Server
    proxy: Proxy
    values: Server

    def steered(self) -> float:
        """Steps with values so far, as vLLM's own metrics tell."""
        counts = metrics(self.vllm.url)
        return counts["lenvm_steps_total"] - counts["lenvm_fallback_steps_total"]

    def recovery_s(self) -> float:
        """Seconds until the next step with values. Raises RuntimeError if vLLM has died."""
        if self.vllm.process.poll() is not None:
            raise RuntimeError(f"vLLM has ended, see {self.vllm.log}")
        before = self.steered()
        return wait_until(lambda: self.steered() > before, PATIENCE_S)

    def deaths(self) -> int:
        return self.vllm.log.read_text(errors="replace").count("EngineDeadError")


@contextmanager
def stage_of(folder: Path) -> Iterator[Stage]:
    """Of tiny random models, up as long as the block."""
    port, float32 = free_port(), ("--dtype", "float32")
    checkpoint, log = tiny_checkpoint(folder / "value"), folder / "values.log"
    values = lenvm_serve(checkpoint, log, *float32, "--slots", SLOTS, port=port)
    with Proxy(port) as proxy:
        vllm = vllm_serve(
            *(tiny_llm(folder / "model"), folder / "vllm.log", *float32),
            *("--served-model-name", "tiny", "--max-model-len", 512),
            values_url=f"http://127.0.0.1:{proxy.port}",
        )
        with values, vllm:
            yield Stage(vllm, proxy, values)


@contextmanager
def restarted(server: Server) -> Iterator[None]:
    server.stop()
    server.start()
    yield


def starved(server: Server) -> AbstractContextManager[None]:
    """A twentieth of the time."""

    def turn() -> None:
        with paused(server):
            time.sleep(0.095)
        time.sleep(0.005)

    return meanwhile(turn)


@contextmanager
def filled(server: Server) -> Iterator[None]:
    """Others want as many slots as there are, again and again."""
    draw, numbers = random.Random(0), itertools.count()
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:

        def turn() -> None:
            texts = [[draw.randrange(256) for _ in range(400)] for _ in range(9)]
            rows = [Row(f"other-{next(numbers)}", 0, text) for text in texts]
            http.post(wire.STEP_PATH, content=wire.encode(step_request(rows)))

        with meanwhile(turn):
            yield


FAULTS: dict[str, Callable[[Stage], AbstractContextManager[None]]] = {
    "killed": lambda stage: killed(stage.values),
    "paused": lambda stage: paused(stage.values),
    "corrupt": lambda stage: stage.proxy.spoilt("corrupt"),
    "filled": lambda stage: filled(stage.values),
    "late": lambda stage: stage.proxy.spoilt("lag"),
    "restarted": lambda stage: restarted(stage.values),
    "cut": lambda stage: stage.proxy.spoilt("cut"),
    "starved": lambda stage: starved(stage.values),
    "trickle": lambda stage: stage.proxy.spoilt("trickle"),
    "vllm restarted": lambda stage: restarted(stage.vllm),
}


def fail(stage: Stage, faults: int, hold_s: float) -> dict[str, list[float]]:
    """Of all kinds in turn; seconds until each was recovered from."""
    recovery: dict[str, list[float]] = {}
    stage.recovery_s()
    kinds = itertools.islice(itertools.cycle(FAULTS), faults)
    for kind in tqdm(kinds, desc="faults", total=faults):
        with FAULTS[kind](stage):
            time.sleep(hold_s)
        recovery.setdefault(kind, []).append(stage.recovery_s())
    return recovery


@app.default
def main(*, requests: int = 200, faults: int = 30, hold_s: float = 3.0, clients: int = 8) -> None:
    """Fail, recover, and end with one JSON line.

    Parameters
    ----------
    requests
        At least; the load goes on until all faults are over, too.
    faults
        Of all kinds in turn.
    hold_s
        Seconds that a fault lasts.
    clients
        Requests at a time.
    """
    with tempfile.TemporaryDirectory() as name, stage_of(Path(name)) as stage:
        load = Load(stage.vllm, clients)
        try:
            recovery = fail(stage, faults, hold_s)
            wait_until(lambda: load.counts["requests"] >= requests, PATIENCE_S)
        finally:
            load.finish()
        deaths = stage.deaths()
    for kind, seconds in recovery.items():
        print(f"{kind:15} recovered after {', '.join(f'{s:.2f}' for s in seconds)} s")
    everything = [s for seconds in recovery.values() for s in seconds]
    names = ("requests", "lost", "outside_rails", "resent")
    result = {name: load.counts[name] for name in names} | {"engine_deaths": deaths}
    p95 = round(float(np.percentile(everything, 95)), 2)
    print(json.dumps(result | {"faults": len(everything), "recovery_s_p95": p95}))


if __name__ == "__main__":
    app()
