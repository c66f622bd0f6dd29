"""`lenvm serve`: load a checkpoint, listen."""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import torch
import uvicorn
from cyclopts import Parameter
from fastapi import FastAPI

from value_server.contract.listen import check_port, check_socket
from value_server.engine.batcher import Batcher
from value_server.engine.engine import Engine
from value_server.engine.linear import compute_dtype, weight_dtype
from value_server.engine.memory import keep_freed_memory
from value_server.http.app import create_app
from value_server.http.telemetry import configure_logs, trace
from value_server.http.text import Texts
from value_server.model.value_model import ValueModel
from value_server.settings import ServerSettings

log = logging.getLogger(__name__)

LAST_S = 10  # for answers that are being written when the server ends
BROKEN = 70  # exit code of a server whose engine does not work any more (EX_SOFTWARE)


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
    configure_logs(settings.log_format)
    signal.signal(signal.SIGTERM, _stop)  # until the server has its own; process 1 has no default
    if settings.uds:
        check_socket(settings.uds)
    else:
        check_port(settings.host, settings.port)
    try:
        app = build_app(checkpoint, settings)
        trace(app)
        if settings.metrics_port is not None:
            app.state.shared.metrics.listen(
                settings.host, settings.metrics_port, settings.tls_cert, settings.tls_key
            )
    except Exception as error:  # a dozen libraries read a model, each with its own errors
        log.debug("load failed", exc_info=error)
        reason = " ".join(str(error).split()) or repr(error)
        sys.exit(f"error: cannot serve {checkpoint}: {reason}")
    server = ValueServer(_config(app, settings), app.state.shared.batcher, settings.drain_s)
    server.run()
    if server.broken:
        logging.shutdown()
        os._exit(BROKEN)  # a thread that is stuck in a kernel would hold up any other exit


def _stop(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _config(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
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


class ValueServer(uvicorn.Server):
    """SIGTERM: refuse what comes, finish what runs, and end. A second one, or SIGINT: at once.

    An engine that does not work any more ends it, too; then `broken` is set.
    """

    def __init__(self, config: uvicorn.Config, batcher: Batcher, drain_s: float) -> None:
        super().__init__(config)
        self.broken = False
        self._batcher, self._drain_s = batcher, drain_s
        self._end = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig != signal.SIGTERM or self._batcher.draining:
            super().handle_exit(sig, frame)
            return
        log.info("SIGTERM: finishing %d requests", self._batcher.depth)
        self._drain()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; asked ten times a second."""
        if not (self.broken or self._batcher.works):
            log.error("the engine does not work any more: ending with exit code %d", BROKEN)
            self.broken = True
            self._drain()
        done = self.broken or self._batcher.depth == 0
        return await super().on_tick(counter) or (done and time.monotonic() >= self._end)

    def _drain(self) -> None:
        self._batcher.drain()
        self._end = time.monotonic() + self._drain_s


def build_app(checkpoint: Path, settings: ServerSettings) -> FastAPI:
    """Load everything, warm it up and put it together. Raises what loading raises."""
    tokens = settings.tokens  # a file that cannot be read is told before the model is loaded
    engine = load(checkpoint, settings)
    lenvm = engine.model.lenvm
    base_model = settings.base_model or lenvm.base_model
    return create_app(
        engine,
        Texts.load(checkpoint, base_model, lenvm.tokenizer_fingerprint),
        tokens=tokens,
        max_body_bytes=settings.max_body_bytes,
        max_waiting=settings.max_waiting,
    )


def load(checkpoint: Path, settings: ServerSettings) -> Engine:
    """A checkpoint, ready to serve. Raises what loading raises."""
    keep_freed_memory()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if settings.device == "auto" else settings.device)
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
        graphs=settings.graphs,
    )
    engine.warm_up()
    return engine
