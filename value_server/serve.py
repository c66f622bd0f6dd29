"""`lenvm serve`: load a checkpoint, listen."""

import asyncio
import functools
import logging
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated

import torch
import uvicorn
from cyclopts import Parameter
from fastapi import FastAPI

from value_server.contract.listen import check_port, check_socket
from value_server.engine.engine import Engine
from value_server.engine.linear import compute_dtype, weight_dtype
from value_server.engine.memory import keep_freed_memory
from value_server.engine.served import Served
from value_server.http.app import create_app
from value_server.http.logs import configure
from value_server.http.text import Texts, tokenizer_source
from value_server.http.traces import trace
from value_server.model.value_model import ValueModel
from value_server.settings import ServerSettings

log = logging.getLogger(__name__)

LAST_S = 10  # for answers that are being written when the server ends


def serve(
    checkpoint: Path,
    *,
    settings: Annotated[ServerSettings | None, Parameter(name="*")] = None,
) -> None:
    """Serve the value model in the folder CHECKPOINT until interrupted.

    A model that cannot be served is one line on stderr and exit code 1.

    Parameters
    ----------
    checkpoint
        Folder of a value model, as `lenvm train` writes it.
    """
    settings = settings or ServerSettings()
    configure(settings.log_format)
    signal.signal(signal.SIGTERM, _stop)  # until the server has its own; process 1 has no default
    if settings.uds:
        check_socket(settings.uds)
    else:
        check_port(settings.host, settings.port)
    try:
        app = build_app(checkpoint, settings)
        trace(app)
        if settings.metrics_port is not None:
            files = settings.tls_cert, settings.tls_key
            app.state.metrics.listen(settings.host, settings.metrics_port, *files)
    except Exception as error:  # a dozen libraries read a model, each with its own errors
        log.debug("load failed", exc_info=error)
        sys.exit(f"error: cannot serve {checkpoint}: {_one_line(error)}")
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        uds=str(settings.uds) if settings.uds else None,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        log_config=None,  # ours is for all
        access_log=False,
        timeout_keep_alive=3600,  # the plugin keeps its connection between requests
        timeout_graceful_shutdown=LAST_S,
    )
    again = functools.partial(load, checkpoint, settings)
    server = ValueServer(config, app.state.served, settings.drain_s, again)
    signal.signal(signal.SIGHUP, server.reload)
    server.run()


def _stop(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


class ValueServer(uvicorn.Server):
    """SIGTERM: refuse what comes, finish what runs, and end. SIGHUP: load the checkpoint again.

    A second SIGTERM, or SIGINT, ends at once. A checkpoint that cannot be served changes nothing.
    """

    def __init__(
        self, config: uvicorn.Config, served: Served, drain_s: float, load: Callable[[], Engine]
    ) -> None:
        super().__init__(config)
        self._served, self._drain_s, self._load = served, drain_s, load
        self._end = float("inf")
        self._asked = False
        self._switch: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig != signal.SIGTERM or self._served.draining:
            super().handle_exit(sig, frame)
            return
        log.info("SIGTERM: finishing %d requests", self._served.depth)
        self._served.drain()
        self._end = time.monotonic() + self._drain_s

    def reload(self, *_: object) -> None:
        """Load the checkpoint again, some time soon."""
        self._asked = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; asked ten times a second."""
        if self._asked:
            self._asked = False
            self._begin_switch()
        drained = time.monotonic() >= self._end and self._served.depth == 0
        return await super().on_tick(counter) or drained

    def _begin_switch(self) -> None:
        if self._switch is not None and not self._switch.done():
            log.error("SIGHUP: sessions are still on the checkpoint before this one")
            return
        self._switch = asyncio.create_task(self._load_and_switch())

    async def _load_and_switch(self) -> None:
        try:
            await self._served.switch(await asyncio.to_thread(self._load))
        except Exception as error:
            log.error("SIGHUP: the checkpoint stays as it is: %s", _one_line(error))


def build_app(checkpoint: Path, settings: ServerSettings) -> FastAPI:
    """Load everything, warm it up and put it together. Raises what loading raises."""
    tokens = settings.tokens
    engine = load(checkpoint, settings)
    lenvm = engine.model.lenvm
    source = tokenizer_source(checkpoint, settings.base_model or lenvm.base_model)
    return create_app(
        engine,
        Texts.load(source, lenvm.tokenizer_fingerprint),
        tokens=tokens,
        max_body_bytes=settings.max_body_bytes,
        max_waiting=settings.max_waiting,
    )


def load(checkpoint: Path, settings: ServerSettings) -> Engine:
    """A checkpoint, ready to serve. Raises what loading raises."""
    keep_freed_memory()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = _device(settings.device)
    dtype = weight_dtype(settings.dtype, device)
    model = ValueModel.load(checkpoint, settings.base_model, compute_dtype(dtype, device))
    engine = Engine(
        model.to(device),
        slots=settings.slots,
        max_sessions=settings.max_sessions,
        max_candidates=settings.max_candidates,
        session_ttl=settings.session_ttl,
        client_sessions=settings.client_sessions,
        client_slots=settings.client_slots,
        pass_tokens=settings.pass_tokens,
        prefill_tokens=settings.prefill_tokens,
        weight_dtype=dtype,
        compiled=settings.compile,
    )
    engine.warm_up()
    return engine


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or repr(error)
