"""A step of the engine in this process, and the same one of a value server over a socket."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.systems.steps import step_request
from benchmarks.systems.timing import times_ms
from lenvm_vllm.commands.processes import Server
from lenvm_vllm.commands.servers import lenvm_serve
from lenvm_vllm.values.client import ValueClient
from tests.support.tiny import tiny_checkpoint, tiny_model
from value_server.engine.engine import Engine
from value_server.engine.job import Job, Row

PROMPT = list(range(100, 228))
STEPS, WARM = 250, 50


def overhead_ms(sessions: int = 32, candidates: int = 15) -> dict[str, float]:
    """p50 of a step over TCP and over a Unix socket, less that of the engine alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    engine = Engine(tiny_model(max_position=1024), slots=1 << 16)
    engine.warm_up()
    alone = p50_ms(lambda rows: engine.run(Job(rows)), sessions, candidates)
    torch.set_num_threads(threads)
    with TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, socket = tiny_checkpoint(folder / "model", max_position=1024), folder / "socket"
        tcp = lenvm_serve(checkpoint, folder / "log", "--dtype", "float32")
        unix = lenvm_serve(checkpoint, folder / "log", "--dtype", "float32", uds=socket)
        times = {
            "tcp": http_ms(tcp, tcp.url, sessions, candidates),
            "unix": http_ms(unix, f"unix:{socket}", sessions, candidates),
        }
    return {"engine": alone} | {way: ms - alone for way, ms in times.items()}


def http_ms(server: Server, url: str, sessions: int, candidates: int) -> float:
    """With the plugin's client, on a connection that stays open."""
    client = ValueClient(url, timeout_s=60)
    with server:
        return p50_ms(lambda rows: client.step(step_request(rows)), sessions, candidates)


def p50_ms(run: Callable[[Sequence[Row]], object], sessions: int, candidates: int) -> float:
    """Median of steps in each of which all sessions emit a token; their prompt goes first."""
    names = [f"s{number}" for number in range(sessions)]
    ids = range(candidates)
    run([Row(name, 0, PROMPT, ids) for name in names])
    lengths = itertools.count(len(PROMPT))

    def step() -> None:
        length = next(lengths)
        run([Row(name, length, [0], ids) for name in names])

    return statistics.median(times_ms(step, STEPS, WARM))
