"""Does the server stay right under random load for a long time?

    python -m benchmarks.systems.soak --minutes 10

Several clients open sessions, step, rewind, vanish without a word and come back, with prompts of
1 to 4,000 tokens and a pool too small for all of them. Every score is compared with an uncached
forward of the same tiny model; at the end all sessions are closed, and no slot may be left.
"""

import json
import random
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from cyclopts import App
from tqdm import tqdm

from benchmarks.systems.http_overhead import tiny_model
from lenvm_vllm.commands.processes import VALUE_SERVER, free_port, running
from lenvm_vllm.values.client import Refused, ValueClient
from value_server.contract import wire
from value_server.model.value_model import ValueModel

app = App(help=__doc__)
LONGEST = 4000
SLOTS = 12_000
TOLERANCE = 1e-3  # float32 logits; two candidates of one step differ by 0.01 and more


class Load:
    """One client: its sessions, and what became of its steps."""

    def __init__(self, number: int, url: str, reference: ValueModel) -> None:
        self.draw = random.Random(number)
        self.client = ValueClient(url, timeout_s=120, backoff_s=(0.01, 0.01))
        self.reference = reference
        self.prefix = f"c{number}-"
        self.texts: dict[str, list[int]] = {}
        self.sent: dict[str, int] = {}
        self.counts: Counter[str] = Counter()
        self.worst = 0.0
        self.opened = 0

    def step(self) -> None:
        """Some sessions, one message."""
        closed = self._vanish()
        while len(self.texts) < 3 or self.draw.random() < 0.2:
            self._open()
        names = self.draw.sample(sorted(self.texts), self.draw.randint(1, min(4, len(self.texts))))
        candidates = [self.draw.sample(range(64), self.draw.randint(1, 8)) for _ in names]
        for name in names:
            self._go_on(name)
        self._ask(names, candidates, closed)

    def _open(self) -> None:
        length = self.draw.choice([1, 7, 60, 300, 1000, LONGEST])
        shared = random.Random(length)  # half of the prompts begin alike
        source = shared if self.draw.random() < 0.5 else self.draw
        name = f"{self.prefix}{self.opened}"
        self.opened += 1
        self.texts[name] = [source.randrange(64) for _ in range(self.draw.randint(1, length))]
        self.sent[name] = 0

    def _vanish(self) -> list[str]:
        """Now and then a session ends: told to the server, or not."""
        if len(self.texts) < 6 or self.draw.random() < 0.5:
            return []
        name = self.draw.choice(sorted(self.texts))
        del self.texts[name], self.sent[name]
        return [name] if self.draw.random() < 0.5 else []

    def _go_on(self, name: str) -> None:
        text = self.texts[name]
        if self.sent[name] and self.draw.random() < 0.1:
            del text[self.draw.randint(1, len(text)) :]
            self.sent[name] = self.draw.randint(0, len(text))
        elif self.sent[name]:
            text += [self.draw.randrange(64) for _ in range(self.draw.choice([1, 1, 1, 5]))]

    def _ask(self, names: list[str], candidates: list[list[int]], closed: list[str]) -> None:
        tokens = [self.texts[n][self.sent[n] :] for n in names]
        request = wire.StepRequest(
            sessions=names,
            starts=[self.sent[n] for n in names],
            token_counts=[len(t) for t in tokens],
            tokens=wire.pack_ids([x for t in tokens for x in t]),
            candidate_counts=[len(c) for c in candidates],
            candidates=wire.pack_ids([x for c in candidates for x in c]),
            closed=closed,
        )
        try:
            logits, unknown = self.client.step(request)
        except Refused as error:
            self.counts["busy" if "503" in str(error) else "failed"] += 1
            return
        self.counts["steps"] += 1
        first = 0
        for row, (name, ids) in enumerate(zip(names, candidates, strict=True)):
            own = logits[first : first + len(ids)]
            first += len(ids)
            if row in unknown:
                self.counts["unknown"] += 1
                self.sent[name] = 0
                continue
            self.sent[name] = len(self.texts[name])
            self._compare(self.texts[name], ids, own)

    @torch.inference_mode()
    def _compare(self, text: list[int], ids: list[int], logits: np.ndarray) -> None:
        pick = self.draw.randrange(len(ids))  # one candidate a row: the reference is slow
        expected = self.reference(torch.tensor([[*text, ids[pick]]]))[0, -1].item()
        error = abs(float(logits[pick]) - expected)
        self.worst = max(self.worst, error)
        self.counts["checked"] += 1
        self.counts["wrong"] += not error < TOLERANCE


def gauge(url: str, name: str) -> float:
    """One number of the server's /metrics."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name} "))
    return float(line.split()[1])


@app.default
def main(*, minutes: float = 10.0, clients: int = 4) -> None:
    """Run, and end with one JSON line.

    Parameters
    ----------
    minutes
        How long.
    clients
        Threads, each with its own connection and sessions.
    """
    torch.set_num_threads(1)
    model = tiny_model()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save(folder / "model")
        url = f"http://127.0.0.1:{(port := free_port())}"
        command = [
            *VALUE_SERVER, str(folder / "model"), "--port", str(port), "--dtype", "float32",
            "--threads", "1", "--slots", str(SLOTS), "--max-sessions", "24", "--session-ttl", "20",
        ]  # fmt: skip
        with running(command, f"{url}/ready", folder / "log") as server:
            print(json.dumps(run(url, psutil.Process(server.pid), model, minutes, clients)))


def run(
    url: str, server: psutil.Process, model: ValueModel, minutes: float, clients: int
) -> dict[str, float]:
    """The last line."""
    end = time.monotonic() + 60 * minutes
    loads = [Load(i, url, model) for i in range(clients)]

    def work(load: Load) -> None:
        while time.monotonic() < end:
            load.step()

    threads = [threading.Thread(target=work, args=(load,)) for load in loads]
    for thread in threads:
        thread.start()
    memory: list[float] = []
    for _ in tqdm(range(100), desc="soak"):
        time.sleep(max(0.0, end - time.monotonic()) / max(1, 100 - len(memory)))
        memory.append(server.memory_info().rss / 2**20)
    for thread in threads:
        thread.join()
    evictions = gauge(url, "lenvm_evictions_total")
    for load in loads:
        for name in load.texts:
            httpx.delete(f"{url}/v1/sessions/{name}", trust_env=False)
    for _ in range(60):  # the others expire
        if gauge(url, "lenvm_sessions") == 0:
            break
        time.sleep(1)
    total: Counter[str] = sum((load.counts for load in loads), Counter())
    names = ("steps", "checked", "wrong", "failed", "busy", "unknown")
    return {
        **{n: total[n] for n in names},
        "worst_error": max(load.worst for load in loads),
        "evictions": evictions,
        "leaked_slots": gauge(url, "lenvm_slots_used"),
        "rss_mb_after_10_percent": round(memory[10], 1),
        "rss_mb_at_end": round(memory[-1], 1),
    }


if __name__ == "__main__":
    app()
