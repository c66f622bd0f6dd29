"""`lenvm serve`: load checkpoints, listen."""

import logging
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated

import torch
import uvicorn
from cyclopts import Parameter
from fastapi import FastAPI

from value_server.contract.checkpoint import read_config
from value_server.contract.listen import check_certificate, check_port, check_socket
from value_server.engine.engine import Engine
from value_server.engine.linear import compute_dtype, weight_dtype
from value_server.engine.memory import keep_freed_memory
from value_server.http.app import create_app
from value_server.http.models import Models, ServedModel
from value_server.http.telemetry import configure_logs, trace
from value_server.http.text import Texts
from value_server.model.text_part import picture_token
from value_server.model.value_model import ValueModel
from value_server.settings import ServerSettings

log = logging.getLogger(__name__)

LAST_S = 10  # for answers that are being written when the server ends
BROKEN = 70  # exit code of a server of whose engines none works any more (EX_SOFTWARE)
LEAST_SLOTS = 64  # of a model
# As a part of a URL needs no escapes; a hub name has a slash.
_NAME = re.compile(r"[A-Za-z0-9][\w.:+-]*(/[A-Za-z0-9][\w.:+-]*)*", re.ASCII)


def serve(
    checkpoint: Annotated[list[str], Parameter(negative=())],
    *,
    settings: Annotated[ServerSettings | None, Parameter(name="*")] = None,
) -> None:
    """Serve the value model in the folder CHECKPOINT until interrupted.

    A model that cannot be served is one line on stderr and exit code 1.

    Parameters
    ----------
    checkpoint
        Folder of a value model, as `lenvm train` writes it; or several, as NAME=CHECKPOINT, each
        behind /models/NAME of the server's URL.
    """
    checkpoints = by_name(checkpoint)
    settings = settings or ServerSettings()
    configure_logs(settings.log_format)
    signal.signal(signal.SIGTERM, _stop)  # until the server has its own; process 1 has no default
    if settings.uds:
        check_socket(settings.uds)
    else:
        check_port(settings.host, settings.port)
    if settings.metrics_port is not None:
        check_port(settings.host, settings.metrics_port, "metrics_port")
    if settings.tls_cert and settings.tls_key:
        check_certificate(settings.tls_cert, settings.tls_key)
    try:
        app = build_app(checkpoints, settings)
        trace(app)
        if settings.metrics_port is not None:
            app.state.figures.listen(
                settings.host, settings.metrics_port, settings.tls_cert, settings.tls_key
            )
    except Exception as error:  # a dozen libraries read a model, each with its own errors
        log.debug("load failed", exc_info=error)
        reason = " ".join(str(error).split()) or repr(error)
        sys.exit(f"error: cannot serve {' '.join(checkpoint)}: {reason}")
    server = ValueServer(_config(app, settings), app.state.models, settings.drain_s)
    server.run()
    if server.ended:
        logging.shutdown()
        # A thread that is stuck in a kernel would hold up any other exit.
        os._exit(BROKEN if server.broken else 0)


def by_name(given: Sequence[str]) -> dict[str, Path]:
    """NAME=CHECKPOINT each, or CHECKPOINT, whose name is "" then. Raises ValueError.

    A path that is there is a checkpoint, with whatever it has of "=".
    """
    found: dict[str, Path] = {}
    if not given:
        raise ValueError("checkpoint: none is given")
    for each in given:
        name, equals, path = each.partition("=")
        if not equals or Path(each).exists():
            name, path = "", each
        elif not (_NAME.fullmatch(name) and path):
            raise ValueError(
                f"checkpoint: {each!r}, must be CHECKPOINT or NAME=CHECKPOINT, "
                "NAME of letters, digits and . _ : + - /"
            )
        if name in found:
            what = f"the name {name!r} twice" if name else "two without a name"
            raise ValueError(f"checkpoint: {what}, {found[name]} and {path}")
        found[name] = Path(path)
    return found


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

    Where no engine works any more it ends, too; then `broken` is set. One of several leaves the
    others at work. ended: names of those that do not work any more.
    """

    def __init__(self, config: uvicorn.Config, models: Models, drain_s: float) -> None:
        super().__init__(config)
        self.broken = False
        self.ended: set[str] = set()
        self._models, self._drain_s = models, drain_s
        self._end = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig != signal.SIGTERM or self._models.draining:
            super().handle_exit(sig, frame)
            return
        log.info("SIGTERM: finishing %d requests", self._models.depth)
        self._drain()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; asked ten times a second."""
        for name in sorted(self._models.ended - self.ended):
            log.error("the engine of %s does not work any more", name or "the model")
            self.ended.add(name)
        if not (self.broken or self._models.works):
            log.error("no engine works any more: ending with exit code %d", BROKEN)
            self.broken = True
            self._drain()
        done = self.broken or self._models.depth == 0
        return await super().on_tick(counter) or (done and time.monotonic() >= self._end)

    def _drain(self) -> None:
        self._models.drain()
        self._end = time.monotonic() + self._drain_s


def build_app(checkpoints: Mapping[str, Path], settings: ServerSettings) -> FastAPI:
    """Load everything, warm it up and put it together. Raises what loading raises.

    checkpoints: by name; the slots are parted evenly.
    """
    tokens = settings.tokens  # what is wrong is told before the first model is loaded
    for checkpoint in checkpoints.values():
        read_config(checkpoint)
    slots = settings.slots // len(checkpoints)
    if slots < LEAST_SLOTS:
        what = f"for {len(checkpoints)} models, at least {LEAST_SLOTS} each"
        raise ValueError(f"slots: {settings.slots} {what}")
    settings = settings.model_copy(update={"slots": slots})
    models = {name: _served(name, checkpoint, settings) for name, checkpoint in checkpoints.items()}
    return create_app(models, tokens=tokens, max_body_bytes=settings.max_body_bytes)


def _served(name: str, checkpoint: Path, settings: ServerSettings) -> ServedModel:
    if name:
        log.info("loading %s from %s", name, checkpoint)
    engine = load(checkpoint, settings)
    lenvm = engine.model.lenvm
    base_model = settings.base_model or lenvm.base_model
    texts = Texts.load(checkpoint, base_model, lenvm.tokenizer_fingerprint)
    return ServedModel.of(
        engine,
        texts,
        settings.max_waiting,
        name,
        picture_pixels=settings.picture_pixels,
        picture_token=picture_token(base_model),
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
        picture_bytes=settings.picture_bytes,
    )
    engine.warm_up()
    return engine
