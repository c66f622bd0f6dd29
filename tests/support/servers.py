"""Real servers for the end-to-end tests, small enough for two cores."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lenvm_vllm.commands import servers

# For a plugin beside a value server that answers, however long either of them stands still: it has
# an eighth of the first to tell of its model.
WAITS = {"LENVM_TIMEOUT_S": "240", "LENVM_WAIT_FLOOR_S": "30"}
BARE_FLAG = ("--logits-processors", "lenvm_vllm")
TINY = ("--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "512")


@contextlib.contextmanager
def vllm_serve(
    model: Path, log: Path, *flags: str, env: dict[str, str] | None = None
) -> Iterator[str]:
    """The base URL of a `vllm serve` of `model` under the name "tiny"."""
    env = {"HF_HUB_OFFLINE": "1"} | (env or {})
    with servers.vllm_serve(model, log, *TINY, *flags, env=env) as server:
        yield server.url


@contextlib.contextmanager
def value_serve(
    checkpoint: Path, base_model: Path, log: Path, port: int, *more: str
) -> Iterator[int]:
    """The process id of a value server on loopback. more: other models, NAME=CHECKPOINT."""
    flags = ("--dtype", "float32", *more)
    with servers.lenvm_serve(checkpoint, log, *flags, base_model=base_model, port=port) as server:
        yield server.process.pid
