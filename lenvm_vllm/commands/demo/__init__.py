"""`lenvm demo`: a value server and a `vllm serve` on loopback, and what they answer.

Everything starts from this checkout's own environment.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lenvm_vllm.api.playground import PAGE
from lenvm_vllm.commands.processes import free_port, left_by_signals
from lenvm_vllm.commands.servers import HOST, lenvm_serve, vllm_serve
from lenvm_vllm.host.machine import COMPILE_OFF, has_compiler
from value_server.contract.listen import check_port

if TYPE_CHECKING:  # their packages are not in every installation that has this command
    from rich.console import Console

    from lenvm_vllm.commands.demo.page import Waiting

ROOT = Path(__file__).parents[3]
FILES = Path(sys.prefix)  # where logs and answers go
MODEL = Path(sys.prefix) / "share" / "SmolLM2-135M-Instruct"
CHECKPOINT = ROOT / "checkpoints" / "smollm2-135m-instruct"
NAME = "SmolLM2-135M-Instruct"
# Where the value server would listen instead, so that nobody found it.
ELSEWHERE = ("LENVM_SERVER_UDS", "LENVM_SERVER_TLS_CERT", "LENVM_SERVER_TLS_KEY")
STARTING = "starting the value server and vLLM (about a minute)"


@contextlib.contextmanager
def both_servers(
    port: int,
    value_port: int,
    playground: bool = False,
    tell: Callable[[str], None] = lambda what: None,
) -> Iterator[str]:
    """Base URL of a guided vLLM with its value server beside it.

    tell: what is being waited for, some times a second until both are up.
    """
    env = {"HF_HUB_OFFLINE": "1", "LENVM_PLAYGROUND": str(playground)}
    if not has_compiler():
        env[COMPILE_OFF] = "1"  # else a request with logprobs would end the engine
    logs, name = (FILES / "value-server.log", FILES / "vllm.log"), ("--served-model-name", NAME)
    values = lenvm_serve(CHECKPOINT, logs[0], base_model=MODEL, port=value_port, env=env)
    vllm = vllm_serve(MODEL, logs[1], *name, values_url=values.url, port=port, env=env)
    values.waiting = partial(tell, "waiting for the value server")
    vllm.waiting = partial(tell, "waiting for vLLM")
    with values, vllm:
        yield vllm.url


def demo(*, serve: bool = False, port: int | None = None, value_port: int | None = None) -> None:
    """Length control on the small real model; the last line is one JSON object.

    Parameters
    ----------
    serve
        Leave both servers up until interrupted, ask nothing.
    port
        Of vLLM; by default 8000 with --serve, else a free one.
    value_port
        Of the value server; by default 8100 with --serve, else a free one.
    """
    check_checkout()
    if port is None:
        port = 8000 if serve else free_port()
    if value_port is None:
        value_port = 8100 if serve else free_port()
    check_ports(port, value_port)
    for name in ELSEWHERE:
        os.environ.pop(name, None)
    from lenvm_vllm.commands.demo.page import Waiting, console

    page = console()
    with left_by_signals(), contextlib.closing(Waiting(page)) as waiting:
        try:
            (serve_both if serve else compare)(port, value_port, page, waiting)
        except RuntimeError as error:  # no start, with the end of the log, or no answer
            sys.exit(f"error: {error}")


def serve_both(port: int, value_port: int, page: "Console", waiting: "Waiting") -> None:
    """Only a signal ends it."""
    page.print(STARTING)
    with both_servers(port, value_port, playground=True, tell=waiting.tell) as url:
        waiting.close()
        servers = f"vLLM: {url}/v1   value server: http://{HOST}:{value_port}"
        print(f"playground: {url}{PAGE}   {servers}   Ctrl-C ends both", flush=True)
        while True:
            signal.pause()


def compare(port: int, value_port: int, page: "Console", waiting: "Waiting") -> None:
    """The tour, with the servers that it needs."""
    from lenvm_vllm.commands.demo.questions import summary
    from lenvm_vllm.commands.demo.tour import INTRODUCTION, end, tour

    page.print(INTRODUCTION)
    page.print(STARTING)
    with both_servers(port, value_port, tell=waiting.tell) as url:
        answers = tour(url, NAME, page, waiting.tell)
        waiting.close()
        end(page, answers, FILES)
    print(json.dumps(summary(answers)))


def check_checkout() -> None:
    """Raises ValueError outside of one that is set up: the demo's models are not in the wheel."""
    for path in (CHECKPOINT, MODEL):
        if not path.is_dir():
            raise ValueError(
                f"demo: no {path}; it runs in a checkout of lenvm-vllm, by `make demo`, and not "
                "from the installed package"
            )


def check_ports(port: int, value_port: int) -> None:
    """Raises ValueError or OSError that names the one which the demo cannot have."""
    for name, number in (("port", port), ("value_port", value_port)):
        if not 0 < number < 65536:
            raise ValueError(f"{name}: {number}, must be from 1 to 65535")
        check_port(HOST, number)
    if port == value_port:
        raise ValueError(f"value_port: {value_port} is vLLM's port already")
