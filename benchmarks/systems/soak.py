"""Does the server stay right under random load for a long time?

    python -m benchmarks.systems.soak --minutes 10

Several clients open sessions, step, rewind, vanish without a word and come back, with prompts of
1 to 4,000 tokens and a pool too small for all of them. Every score is compared with an uncached
forward of the same tiny model; at the end all sessions are closed, and no slot may be left.
"""

import contextlib
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import torch
from cyclopts import App

from benchmarks.metrics import metrics
from benchmarks.provenance import end
from benchmarks.systems.steps import Sessions
from benchmarks.systems.timing import wait_until
from benchmarks.systems.watch import Watch, tiny_value_server
from lenvm_vllm.commands.processes import Server
from lenvm_vllm.values.client import Refused, ValueClient
from tests.support.tiny import tiny_model
from value_server.model.value_model import ValueModel

app = App(help=__doc__)
LONGEST = 4000
MOST_POSITIONS = 2 * LONGEST  # they go on from there
LIMITS = ("--slots", 12_000, "--max-sessions", 24, "--session-ttl", 20)
TOLERANCE = 1e-3  # float32 logits; two candidates of one step differ by 0.01 and more


class Load:
    """One client: its sessions, and what became of its steps."""

    def __init__(self, number: int, url: str, reference: ValueModel) -> None:
        self.draw = random.Random(number)
        self.client = ValueClient(url, timeout_s=120, backoff_s=(0.01, 0.01))
        self.reference = reference
        self.prefix = f"c{number}-"
        self.sessions = Sessions()
        self.counts: Counter[str] = Counter()
        self.worst = 0.0
        self.opened = 0

    def step(self) -> None:
        """Some sessions, one message."""
        closed, texts = self._vanish(), self.sessions.texts
        while len(texts) < 3 or self.draw.random() < 0.2:
            self._open()
        names = self.draw.sample(sorted(texts), self.draw.randint(1, min(4, len(texts))))
        for name in names:
            self._go_on(name)
        candidates = {n: self.draw.sample(range(64), self.draw.randint(1, 8)) for n in names}
        try:
            answers = self.sessions.ask(self.client, candidates, closed)
        except Refused as error:
            self.counts["busy" if error.status == 503 else "failed"] += 1
            return
        self.counts["steps"] += 1
        self.counts["pending"] += len(names) - len(answers)
        for name, logits in answers.items():  # one candidate a row: the reference is slow
            pick = self.draw.randrange(len(logits))
            self._compare([*texts[name], candidates[name][pick]], float(logits[pick]))

    def _open(self) -> None:
        length = self.draw.choice([1, 7, 60, 300, 1000, LONGEST])
        shared = random.Random(length)  # half of the prompts begin alike
        source = shared if self.draw.random() < 0.5 else self.draw
        text = [source.randrange(64) for _ in range(self.draw.randint(1, length))]
        self.sessions.open(f"{self.prefix}{self.opened}", text)
        self.opened += 1

    def _vanish(self) -> list[str]:
        """Now and then a session ends: told to the server, or not."""
        if len(self.sessions.texts) < 6 or self.draw.random() < 0.5:
            return []
        name = self.draw.choice(sorted(self.sessions.texts))
        self.sessions.close(name)
        return [name] if self.draw.random() < 0.5 else []

    def _go_on(self, name: str) -> None:
        text, sent = self.sessions.texts[name], self.sessions.sent
        if sent[name] and self.draw.random() < 0.1:
            del text[self.draw.randint(1, len(text)) :]
            sent[name] = self.draw.randint(0, len(text))
        elif sent[name]:
            text += [self.draw.randrange(64) for _ in range(self.draw.choice([1, 1, 1, 5]))]

    @torch.inference_mode()
    def _compare(self, text: list[int], logit: float) -> None:
        """With that of the last token of `text`, computed by the model alone."""
        error = abs(logit - self.reference(torch.tensor([text]))[0, -1].item())
        self.worst = max(self.worst, error)
        self.counts["checked"] += 1
        self.counts["wrong"] += not error < TOLERANCE


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
    with tiny_value_server(*LIMITS, max_position=MOST_POSITIONS) as server:
        end(run(server, minutes, clients))


def run(server: Server, minutes: float, clients: int) -> dict[str, float]:
    """The last line."""
    model = tiny_model(max_position=MOST_POSITIONS)
    end = time.monotonic() + 60 * minutes
    loads = [Load(number, server.url, model) for number in range(clients)]

    def work(load: Load) -> None:
        while time.monotonic() < end:
            load.step()

    watch = Watch(server, minutes)
    with ThreadPoolExecutor(clients) as threads:
        working = [threads.submit(work, load) for load in loads]
        while watch.goes_on():
            time.sleep(0.5)
        for one in working:
            one.result()
    evictions = metrics(server.url)["lenvm_evictions_total"]
    for name in (name for load in loads for name in load.sessions.texts):
        httpx.delete(f"{server.url}/v1/sessions/{name}")
    with contextlib.suppress(TimeoutError):  # the others expire
        wait_until(lambda: metrics(server.url)["lenvm_sessions"] == 0, patience_s=60)
    total: Counter[str] = sum((load.counts for load in loads), Counter())
    names = ("steps", "checked", "wrong", "failed", "busy", "pending")
    return {
        **{name: total[name] for name in names},
        "worst_error": max(load.worst for load in loads),
        "evictions": evictions,
        "leaked_slots": metrics(server.url)["lenvm_slots_used"],
        **watch.memory(),
    }


if __name__ == "__main__":
    app()
