"""Do value servers on Ray Serve answer as one, and what does a killed one cost?

    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60 python -m benchmarks.systems.on_ray

A local Ray cluster, two value servers with a tiny random model, and the plugin's own client with
both URLs. Sessions step; in the middle one server's process is killed, and Ray starts it anew.
"""

import contextlib
import signal
import tempfile
from pathlib import Path

import psutil
import ray
import torch
from cyclopts import App
from ray import serve
from tqdm import tqdm

from benchmarks.provenance import end
from benchmarks.systems.timing import wait_until
from lenvm_vllm.commands.processes import free_port
from lenvm_vllm.engine.messages import Question
from lenvm_vllm.engine.pace import Pace
from lenvm_vllm.engine.sessions import Sessions
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.settings import load_settings
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.telemetry.metrics import Counters
from lenvm_vllm.values.client import ValueServerError
from lenvm_vllm.values.replicas import Replicas, connect
from tests.support.tiny import tiny_checkpoint
from value_server.on_ray import start
from value_server.settings import ServerSettings

app = App(help=__doc__)
SESSIONS = 20
WAIT_S = 10.0  # that a step waits: what is lost is lost with the server, not late


def opened(generation: int) -> list[RequestState]:
    target = LengthTarget.parse(30)
    return [RequestState(target, [number, generation % 250], [], [0]) for number in range(SESSIONS)]


def step(sessions: Sessions, states: list[RequestState]) -> int:
    """One as the plugin makes it, all texts a token longer; rows that have no values in time."""
    sessions.model()
    tokens = torch.tensor([[1, 2]] * len(states))
    none = torch.zeros(len(states), dtype=torch.bool)
    question = Question([*range(len(states))], tokens, tokens > 0, none)
    z = sessions.values(states, question, Pace(1.0, WAIT_S, WAIT_S))
    for state in states:
        state.output_ids.append(state.length % 250)
    return int(z.isnan().any(-1).sum())


def kill(name: str) -> None:
    """The process of one server, as a machine's loss would."""
    for process in psutil.process_iter(["cmdline"]):
        if f"ServeReplica:{name}" in " ".join(process.info["cmdline"] or ()):
            process.send_signal(signal.SIGKILL)
            return
    raise RuntimeError(f"{name}: no such process")


def both_live(servers: Replicas) -> bool:
    with contextlib.suppress(ValueServerError):
        servers.model(lambda: None)
    return len(servers.live) == 2


def run(servers: Replicas, steps: int) -> dict[str, int]:
    """The last line."""
    sessions, unanswered, lost = Sessions(servers, lambda: None, Counters()), 0, False
    wait_until(lambda: both_live(servers))
    for number in tqdm(range(2 * steps)):
        if number % 50 == 0:
            states = opened(number)
        if number == steps:
            kill("values-0")
        unanswered += step(sessions, states)
        lost |= len(servers.live) < 2
    wait_until(lambda: both_live(servers))
    result = {"steps": 2 * steps, "rows": 2 * steps * SESSIONS, "unanswered_rows": unanswered}
    return result | {"lost": lost, "both_back": True}


@app.default
def main(*, steps: int = 200) -> None:
    """Step, kill, step, and end with one JSON line.

    Parameters
    ----------
    steps
        Before the kill, and as many after it.
    """
    ray.init(num_cpus=2, include_dashboard=False)
    with tempfile.TemporaryDirectory() as folder:
        settings = ServerSettings(port=free_port(), slots=4000, threads=1)
        urls = tuple(start(tiny_checkpoint(Path(folder)), settings, replicas=2, cpus=0.5))
        line = run(connect(load_settings({"lenvm": {"url": urls}})), steps)
    serve.shutdown()
    ray.shutdown()  # Ray writes to stdout while it ends
    end(line)


if __name__ == "__main__":
    app()
