"""Servers that several files share: a vLLM and its value server, all tiny but those of `small`.

A test names its pair, `@pytest.mark.pair("tiny")`, and gets it as the fixture `pair` (conftest.py).
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from lenvm_vllm.commands.demo import CHECKPOINT, MODEL, NAME
from lenvm_vllm.commands.processes import free_port
from tests.support.bare import hide_compilers
from tests.support.collector import Collector, collecting
from tests.support.seeing import value_checkpoint
from tests.support.servers import BARE_FLAG, WAITS, value_serve, vllm_serve
from tests.support.tiny import tiny_checkpoint
from tests.support.tiny_llm import tiny_llm, tiny_qwen
from tests.support.tiny_vision import tiny_idefics3

ROOT = Path(__file__).parents[2]
KEY = "k"
# The first answer of a tiny model takes no time, and other endings a share of that.
PATIENT = WAITS | {"LENVM_ENDINGS_PATIENCE": "100", "LENVM_ENDINGS_PAUSE_S": "30"}
# Room for six of the sixteen requests that run at a time: all kinds of them are preempted.
LITTLE_MEMORY = ("--block-size", "32", "--num-gpu-blocks-override", "18")
DOORS = (
    *("--api-key", KEY, "--allowed-origins", '["http://page"]', "--enable-scale-out"),
    *("--middleware", "tests.support.compressing.Compressing", "--scheduling-policy", "priority"),
)


@dataclass
class Pair:
    """client: of vLLM, with its key. values: of the value server, which a test may kill.

    pid: of the value server; None where there is none. collector: of both servers' spans.
    """

    client: httpx.Client
    values: httpx.Client
    model: Path
    log: Path
    start_values: Callable[[], int]
    pid: int | None
    collector: Collector | None = None
    read: int = 0

    @property
    def url(self) -> str:
        """Of vLLM."""
        return str(self.client.base_url).rstrip("/")

    def said(self) -> str:
        """What vLLM has written into its log since this was asked before."""
        text = self.log.read_bytes()[self.read :]
        self.read += len(text)
        return text.decode(errors="replace")

    def kill_values(self) -> None:
        assert self.pid is not None
        os.kill(self.pid, signal.SIGKILL)

    def revive_values(self) -> None:
        """Until vLLM has found it again."""
        self.pid = self.start_values()
        model = self.client.get("/v1/models").json()["data"][0]["id"]
        ask = {"model": model, "prompt": "Hi", "length_target": 8}
        limit = time.monotonic() + 180
        while True:
            (choice,) = self.client.post("/v1/completions", json=ask).json()["choices"]
            if choice["length_result"]["steered_steps"]:
                return
            assert time.monotonic() < limit
            time.sleep(0.5)

    def is_well(self) -> bool:
        """Both servers answer."""
        asked = [(self.client, "/health")]
        if self.pid is not None:
            asked.append((self.values, "/ready"))
        try:
            return all(client.get(path).status_code == 200 for client, path in asked)
        except httpx.HTTPError:
            return False


def start(
    stack: ExitStack,
    folder: Path,
    model: Path,
    checkpoint: Path | None,
    *flags: str,
    env: dict[str, str] | None = None,
    key: str | None = None,
    collector: Collector | None = None,
) -> Pair:
    """Both servers, until the stack is closed. checkpoint: None for no value server."""
    port = free_port()
    values = f"http://127.0.0.1:{port}"

    def start_values() -> int:
        assert checkpoint is not None
        return stack.enter_context(value_serve(checkpoint, model, folder / "values.log", port))

    pid = start_values() if checkpoint else None
    log = folder / "vllm.log"
    url = stack.enter_context(
        vllm_serve(model, log, *flags, env={"LENVM_URL": values} | (env or {}))
    )
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    clients = (
        stack.enter_context(httpx.Client(base_url=u, timeout=300, trust_env=False, headers=headers))
        for u in (url, values)
    )
    return Pair(*clients, model, log, start_values, pid, collector)


def tiny(stack: ExitStack, folder: Path) -> Pair:
    """Preempts requests all the time."""
    model, checkpoint = tiny_llm(folder / "model"), tiny_checkpoint(folder / "value")
    return start(stack, folder, model, checkpoint, *BARE_FLAG, *LITTLE_MEMORY, env=PATIENT)


def alone(stack: ExitStack, folder: Path) -> Pair:
    """Without a value server. Its tokens 258 and 259 begin and end a tool call."""
    model = tiny_llm(folder / "model", more=("<tool_call>", "</tool_call>"))
    return start(stack, folder, model, None, *BARE_FLAG)


def doors(stack: ExitStack, folder: Path) -> Pair:
    """As a careful operator starts it: a key, priorities, forecasts, the playground, traces and a
    middleware that compresses. On a machine without compilers."""
    model, checkpoint = tiny_llm(folder / "model"), tiny_checkpoint(folder / "value")
    collector = stack.enter_context(collecting())
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = PATIENT | {"LENVM_FORECAST": "true", "LENVM_PLAYGROUND": "true", "PYTHONPATH": path}
    flags = (*BARE_FLAG, *DOORS, "--otlp-traces-endpoint", collector.endpoint)
    (folder / "programs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        hide_compilers(patch, folder / "programs")
        for name, value in collector.environment.items():
            patch.setenv(name, value)
        more = {"key": KEY, "collector": collector}
        return start(stack, folder, model, checkpoint, *flags, env=env, **more)


def plain(stack: ExitStack, folder: Path) -> Pair:
    """A vLLM where the plugin is installed and the flag is not given, and a random Qwen2 as its
    family has it: tied embeddings, two tokens that end a text, sampling defaults of its own."""
    model = tiny_qwen(folder / "model")
    return start(stack, folder, model, None)


def small(stack: ExitStack, folder: Path) -> Pair:
    """The real small model and its value model, whose server may die; with the playground."""
    flag = ("--logits-processors", "lenvm_vllm:LenvmLogitsProcessor")  # the long form does, too
    flags = (*flag, "--served-model-name", NAME, "--max-model-len", "2048")
    env = WAITS | {"LENVM_PLAYGROUND": "true"}
    return start(stack, folder, MODEL, CHECKPOINT, *flags, env=env)


def seeing(stack: ExitStack, folder: Path) -> Pair:
    """A tiny Idefics 3, whose classes in vLLM need no torchvision, and a value model that sees."""
    model = tiny_idefics3(folder / "model")
    checkpoint = value_checkpoint(folder / "value", model, sees=True)
    return start(stack, folder, model, checkpoint, *BARE_FLAG, env=PATIENT)


PAIRS = {make.__name__: make for make in (tiny, alone, doors, plain, small, seeing)}
