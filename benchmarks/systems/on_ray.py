"""Do value servers on Ray Serve answer as one, and what does a killed one cost?

    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60 python -m benchmarks.systems.on_ray

A local Ray cluster, two value servers with a tiny random model, and the plugin's own client with
both URLs. Sessions step; in the middle one server's process is killed, and Ray starts it anew.
"""

import contextlib
import json
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import ray
from cyclopts import App
from ray import serve
from tqdm import tqdm

from lenvm_vllm.commands.processes import free_port
from lenvm_vllm.settings import load_settings
from lenvm_vllm.values.client import ValueServerError
from lenvm_vllm.values.replicas import Replicas, connect
from tests.support.tiny import tiny_checkpoint
from value_server.contract import wire
from value_server.on_ray import application
from value_server.settings import ServerSettings

app = App(help=__doc__)
SESSIONS = 20
BACK_S = 180.0  # a server that takes longer to be back is not


class Texts:
    """Sessions that grow by a token a step, asked for as the plugin asks."""

    def __init__(self, servers: Replicas) -> None:
        self.servers = servers
        self.texts: dict[str, list[int]] = {}
        self.sent: dict[str, int] = {}

    def open(self, generation: int) -> None:
        self.texts = {f"g{generation}-{i}": [i, generation % 250] for i in range(SESSIONS)}
        self.sent = dict.fromkeys(self.texts, 0)

    def step(self) -> int:
        """Rows without an answer, after the second try."""
        self.servers.model(lambda: None)
        names = list(self.texts)
        for _ in range(2):
            if not names:
                break
            names = self._ask(names)
        for text in self.texts.values():
            text.append(len(text) % 250)
        return len(names)

    def _ask(self, names: list[str]) -> list[str]:
        """Names of those that have to send their whole text."""
        news = [self.texts[name][self.sent[name] :] for name in names]
        request = wire.StepRequest(
            sessions=names,
            starts=[self.sent[name] for name in names],
            token_counts=[len(new) for new in news],
            tokens=wire.pack_ids([token for new in news for token in new]),
            candidate_counts=[2] * len(names),
            candidates=wire.pack_ids([1, 2] * len(names)),
        )
        logits, unknown = self.servers.step(request)
        assert np.isfinite(logits).sum() == 2 * (len(names) - len(unknown))
        for row, name in enumerate(names):
            self.sent[name] = 0 if row in unknown else len(self.texts[name])
        return [names[row] for row in unknown]


def kill(name: str) -> None:
    """The process of one server, as a machine's loss would."""
    for process in psutil.process_iter(["cmdline"]):
        if f"ServeReplica:{name}" in " ".join(process.info["cmdline"] or ()):
            process.send_signal(signal.SIGKILL)
            return
    raise RuntimeError(f"{name}: no such process")


def wait_for_both(texts: Texts) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + BACK_S
    while len(texts.servers.live) < 2:
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {texts.servers.live} after {BACK_S} s")
        with contextlib.suppress(ValueServerError):
            texts.servers.model(lambda: None)
        time.sleep(0.2)


@app.default
def main(*, steps: int = 200) -> None:
    """Step, kill, step, and end with one JSON line.

    Parameters
    ----------
    steps
        Before the kill, and as many after it.
    """
    ray.init(num_cpus=2, include_dashboard=False)
    port, unanswered, lost = free_port(), 0, False
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_checkpoint(Path(folder))
        settings = ServerSettings(slots=4000, threads=1)
        for number in range(2):
            server = application(checkpoint, settings, cpus=0.5)
            serve.run(server, name=f"values-{number}", route_prefix=f"/values-{number}")
        urls = tuple(f"http://127.0.0.1:{port}/values-{number}" for number in range(2))
        texts = Texts(connect(load_settings({"lenvm": {"url": urls}})))
        wait_for_both(texts)
        for step in tqdm(range(2 * steps)):
            if step % 50 == 0:
                texts.open(step)
            if step == steps:
                kill("values-0")
            unanswered += texts.step()
            lost |= len(texts.servers.live) < 2
        wait_for_both(texts)
        result = {"steps": 2 * steps, "rows": 2 * steps * SESSIONS, "unanswered_rows": unanswered}
        print(json.dumps(result | {"lost": lost, "both_back": True}))
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    app()
