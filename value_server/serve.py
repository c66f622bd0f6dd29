"""`lenvm serve`: load a checkpoint, listen."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import uvicorn
from cyclopts import Parameter
from fastapi import FastAPI

from value_server.app import create_app
from value_server.engine import Engine
from value_server.linear import compute_dtype, weight_dtype
from value_server.memory import keep_freed_memory
from value_server.model import ValueModel
from value_server.settings import ServerSettings
from value_server.text import Texts, tokenizer_source

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "LENVM_TOKEN"


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
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        app = build_app(checkpoint, settings)
    except Exception as error:  # a dozen libraries read a model, each with its own errors
        log.debug("load failed", exc_info=error)
        sys.exit(f"error: cannot serve {checkpoint}: {_one_line(error)}")
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        uds=str(settings.uds) if settings.uds else None,
        log_level="info",
        access_log=False,
        timeout_keep_alive=3600,  # the plugin keeps its connection between requests
    )


def build_app(checkpoint: Path, settings: ServerSettings) -> FastAPI:
    """Load everything, warm it up and put it together. Raises what loading raises."""
    keep_freed_memory()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = _device(settings.device)
    dtype = weight_dtype(settings.dtype, device)
    model = ValueModel.load(checkpoint, settings.base_model, compute_dtype(dtype, device))
    model = model.to(device)
    lenvm = model.lenvm
    source = tokenizer_source(checkpoint, settings.base_model or lenvm.base_model)
    texts = Texts.load(source, lenvm.tokenizer_fingerprint)
    engine = Engine(
        model,
        slots=settings.slots,
        max_sessions=settings.max_sessions,
        max_candidates=settings.max_candidates,
        session_ttl=settings.session_ttl,
        pass_tokens=settings.pass_tokens,
        prefill_tokens=settings.prefill_tokens,
        weight_dtype=dtype,
        compiled=settings.compile,
    )
    engine.warm_up()
    secret = settings.token.get_secret_value() if settings.token else None
    return create_app(
        engine,
        texts,
        token=secret or os.environ.get(TOKEN_VARIABLE) or None,
        max_body_bytes=settings.max_body_bytes,
        max_waiting=settings.max_waiting,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or repr(error)
