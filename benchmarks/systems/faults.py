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
import os
import random
import re
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from cyclopts import App
from tqdm import tqdm

from benchmarks.systems.proxy import Proxy, Spoils
from lenvm_vllm.commands.processes import VALUE_SERVER, VLLM_SERVE, free_port, running
from lenvm_vllm.target.rails import rails_of
from lenvm_vllm.target.request import LengthTarget
from tests.support.tiny import tiny_checkpoint
from tests.support.tiny_llm import tiny_llm
from value_server.contract import wire

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


@dataclass
class Server:
    """A process that can be stopped and started again at the same place."""

    command: list[str]
    ready_url: str
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    starts: int = 0
    up: bool = False

    def start(self) -> None:
        self._stack = contextlib.ExitStack()
        server = running(self.command, self.ready_url, self.log, self.env)
        self.process = self._stack.enter_context(server)
        self.starts += 1
        self.up = True

    def stop(self) -> None:
        """As an operator does."""
        self.up = False
        self._stack.close()

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)


class Load:
    """Guided requests, `clients` at a time, until it is finished; what became of them."""

    def __init__(self, vllm: Server, url: str, clients: int) -> None:
        self.counts: Counter[str] = Counter()
        self._stop = threading.Event()
        self._vllm, self._url = vllm, url
        threads = ThreadPoolExecutor(clients)
        self._work = [threads.submit(self._run, random.Random(i)) for i in range(clients)]

    def finish(self) -> None:
        """Let the last requests end. Raises what a client has raised."""
        self._stop.set()
        for work in self._work:
            work.result()

    def _run(self, draw: random.Random) -> None:
        with httpx.Client(base_url=self._url, timeout=PATIENCE_S, trust_env=False) as http:
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
            reply, starts = None, self._vllm.starts
            with contextlib.suppress(httpx.TransportError):
                reply = http.post("/v1/completions", json=body)
                if reply.status_code == 200:
                    return reply
            if self._vllm.up and self._vllm.starts == starts:
                return reply
            self.counts["resent"] += 1
            _wait_until(lambda: self._vllm.up)


@dataclass
class Stage:
    """All that can fail."""

    vllm: Server
    vllm_url: str
    values: Server
    values_url: str
    proxy: Proxy

    def steered(self) -> float:
        """Steps with values so far, as vLLM's own metrics tell."""
        text = httpx.get(f"{self.vllm_url}/metrics", timeout=PATIENCE_S, trust_env=False).text
        found = dict(re.findall(r"^(lenvm_\w+) (\S+)$", text, re.MULTILINE))
        return float(found["lenvm_steps_total"]) - float(found["lenvm_fallback_steps_total"])

    def recovery_s(self) -> float:
        """Seconds until the next step with values. Raises RuntimeError if vLLM has died."""
        if self.vllm.process.poll() is not None:
            raise RuntimeError(f"vLLM has ended, see {self.vllm.log}")
        began, before = time.monotonic(), self.steered()
        _wait_until(lambda: self.steered() > before)
        return time.monotonic() - began

    def deaths(self) -> int:
        return self.vllm.log.read_text(errors="replace").count("EngineDeadError")


@contextmanager
def killed(stage: Stage) -> Iterator[None]:
    stage.values.signal(signal.SIGKILL)
    yield
    stage.values.stop()  # what is left of it
    stage.values.start()


@contextmanager
def restarted(stage: Stage) -> Iterator[None]:
    stage.values.stop()
    stage.values.start()
    yield


@contextmanager
def paused(stage: Stage) -> Iterator[None]:
    stage.values.signal(signal.SIGSTOP)
    yield
    stage.values.signal(signal.SIGCONT)


@contextmanager
def starved(stage: Stage) -> Iterator[None]:
    """A twentieth of the time."""

    def turn() -> None:
        stage.values.signal(signal.SIGSTOP)
        time.sleep(0.095)
        stage.values.signal(signal.SIGCONT)
        time.sleep(0.005)

    with _meanwhile(turn):
        yield


@contextmanager
def filled(stage: Stage) -> Iterator[None]:
    """Others want as many slots as there are, again and again."""
    draw, numbers = random.Random(0), itertools.count()
    with httpx.Client(base_url=stage.values_url, timeout=PATIENCE_S, trust_env=False) as http:

        def turn() -> None:
            message = wire.StepRequest(
                sessions=[f"other-{next(numbers)}" for _ in range(9)],
                starts=[0] * 9,
                token_counts=[400] * 9,
                tokens=wire.pack_ids([draw.randrange(256) for _ in range(9 * 400)]),
                candidate_counts=[0] * 9,
                candidates=b"",
            )
            http.post(wire.STEP_PATH, content=wire.encode(message))

        with _meanwhile(turn):
            yield


@contextmanager
def vllm_restarted(stage: Stage) -> Iterator[None]:
    stage.vllm.stop()
    stage.vllm.start()
    yield


def spoilt(how: Spoils) -> Callable[[Stage], AbstractContextManager[None]]:
    """The fault that the proxy makes."""

    @contextmanager
    def fault(stage: Stage) -> Iterator[None]:
        stage.proxy.spoils = how
        yield
        stage.proxy.spoils = "nothing"

    return fault


FAULTS: dict[str, Callable[[Stage], AbstractContextManager[None]]] = {
    "killed": killed,
    "paused": paused,
    "corrupt": spoilt("corrupt"),
    "filled": filled,
    "late": spoilt("lag"),
    "restarted": restarted,
    "cut": spoilt("cut"),
    "starved": starved,
    "trickle": spoilt("trickle"),
    "vllm restarted": vllm_restarted,
}


@contextmanager
def _meanwhile(turn: Callable[[], None]) -> Iterator[None]:
    """`turn` again and again, as long as the block lasts."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            turn()

    with ThreadPoolExecutor(1) as threads:
        work = threads.submit(run)
        try:
            yield
        finally:
            stop.set()
        work.result()


def _wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing came in {PATIENCE_S} s")
        time.sleep(0.05)


def _inside(tokens: int, wish: dict[str, Any]) -> bool:
    rails = rails_of(LengthTarget.parse(wish))
    return rails.first <= tokens <= (rails.last or MAX_TOKENS)


@contextmanager
def stage_of(folder: Path) -> Iterator[Stage]:
    """vLLM → proxy → value server."""
    checkpoint, model = tiny_checkpoint(folder / "value"), tiny_llm(folder / "model")
    values_port, vllm_port = free_port(), free_port()
    values_url, vllm_url = (f"http://127.0.0.1:{port}" for port in (values_port, vllm_port))
    values = Server(
        [
            *(*VALUE_SERVER, str(checkpoint), "--port", str(values_port), "--dtype", "float32"),
            *("--threads", "1", "--slots", str(SLOTS)),
        ],
        *(f"{values_url}/ready", folder / "values.log"),
    )
    with Proxy(values_port) as proxy:
        vllm = Server(
            [
                *(*VLLM_SERVE, str(model), "--served-model-name", "tiny", "--dtype", "float32"),
                *("--host", "127.0.0.1", "--port", str(vllm_port), "--enforce-eager"),
                *("--max-model-len", "512", "--max-num-seqs", "16"),
                *("--logits-processors", "lenvm_vllm"),
            ],
            *(f"{vllm_url}/health", folder / "vllm.log"),
            {"LENVM_URL": f"http://127.0.0.1:{proxy.port}", "VLLM_CPU_KVCACHE_SPACE": "1"},
        )
        values.start()
        try:
            vllm.start()
            try:
                yield Stage(vllm, vllm_url, values, values_url, proxy)
            finally:
                vllm.stop()
        finally:
            values.stop()


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
    recovery: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, stage_of(Path(name)) as stage:
        load = Load(stage.vllm, stage.vllm_url, clients)
        try:
            stage.recovery_s()
            kinds = list(itertools.islice(itertools.cycle(FAULTS), faults))
            for kind in tqdm(kinds, desc="faults"):
                with FAULTS[kind](stage):
                    time.sleep(hold_s)
                recovery.setdefault(kind, []).append(stage.recovery_s())
            _wait_until(lambda: load.counts["requests"] >= requests)
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
