"""All that can fail: a load → vLLM → proxy → value server, and the metrics that tell of it."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.metrics import metrics
from benchmarks.systems.proxy import Proxy
from benchmarks.systems.streams import PATIENCE_S, Load, Span
from benchmarks.systems.timing import wait_until
from lenvm_vllm.commands.demo import CHECKPOINT, MODEL, NAME
from lenvm_vllm.commands.processes import Server, free_port
from lenvm_vllm.commands.servers import lenvm_serve, vllm_serve

SLOTS = 16384
LONGEST = 8192  # tokens of a text, as many as the model has positions
# Of a prompt that vLLM computes in one step: a long one takes many steps, and none takes long.
CHUNK = 64
NEW_S = 10.0  # in which vLLM finds another value server


@dataclass
class Stage:
    """clients: guided ones of the load, and as many unguided ones. folder: for what is written.
    port: of the value server, whichever it is.

    stops: deaths of the engine that the log tells of a vLLM that was stopped.
    asides: when servers were started, which takes the time of the others; it is not measured.
    """

    vllm: Server
    proxy: Proxy
    values: Server
    load: Load
    clients: int
    folder: Path
    port: int
    stops: int = 0
    asides: list[Span] = field(default_factory=list)

    def counts(self) -> tuple[float, float]:
        """Guided rows so far whose values mattered, and those that had them in time."""
        found = metrics(self.vllm.url)
        return found["lenvm_rows_total"], found["lenvm_valued_rows_total"]

    def recovery_s(self, patience_s: float = PATIENCE_S) -> float:
        """Seconds until the next values. Raises RuntimeError if vLLM has died, TimeoutError."""
        if self.vllm.process.poll() is not None:
            raise RuntimeError(f"vLLM has ended, see {self.vllm.log}")
        before = self.counts()[1]
        return wait_until(lambda: self.counts()[1] > before, patience_s)

    def deaths(self) -> int:
        """Of vLLM's engine, as its log tells; where vLLM is stopped on purpose its API server says
        the same of the requests that run."""
        dead = self.vllm.log.read_text(errors="replace").count("EngineDeadError")
        return dead - self.stops

    def restart_vllm(self) -> None:
        before = self.deaths()
        self.vllm.stop()
        self.stops += self.deaths() - before
        self.vllm.start()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A time that is not measured."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.asides.append((begin, time.perf_counter()))

    @contextmanager
    def replaced(self, *flags: object, slots: int = SLOTS, model: Path = MODEL) -> Iterator[None]:
        """Another value server in the usual one's place. See `value_server`."""
        usual = self.values
        with self.aside():
            usual.stop()
            self.values = value_server(self.folder, self.port, *flags, slots=slots, model=model)
            self.values.start()
            with contextlib.suppress(TimeoutError):
                self.recovery_s(NEW_S)
        try:
            yield
        finally:
            with self.aside():
                self.values.stop()
                self.values = usual
                usual.start()


def value_server(
    folder: Path, port: int, *flags: object, slots: int = SLOTS, model: Path = MODEL
) -> Server:
    """Of the shipped checkpoint, not started yet. flags: more of `lenvm serve`. model: its
    backbone."""
    flags = ("--slots", slots, *flags)
    return lenvm_serve(CHECKPOINT, folder / "values.log", *flags, base_model=model, port=port)


def halves() -> tuple[list[int], list[int]]:
    """Cores of the value server, and those of vLLM, so that neither takes the other's time."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    return cores[:half] or cores, cores[half:]


@contextmanager
def stage_of(folder: Path, clients: int) -> Iterator[Stage]:
    """Of the small real model, up as long as the block; this process moves to the cores of the
    value server."""
    ours, theirs = halves()
    os.sched_setaffinity(0, ours)
    port, cores = free_port(), ",".join(map(str, theirs))
    values = value_server(folder, port)
    with Proxy(port) as proxy:
        vllm = vllm_serve(
            *(MODEL, folder / "vllm.log", "--served-model-name", NAME),
            *("--max-model-len", LONGEST, "--max-num-batched-tokens", CHUNK),
            values_url=f"http://127.0.0.1:{proxy.port}",
            env={"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores},
        )
        vllm = dataclasses.replace(vllm, command=["taskset", "-c", cores, *vllm.command])
        with values, vllm:
            yield Stage(vllm, proxy, values, Load(vllm), clients, folder, port)
