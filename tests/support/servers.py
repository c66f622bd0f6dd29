"""Real servers for the end-to-end tests, small enough for two cores."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lenvm_vllm.commands.processes import VALUE_SERVER, VLLM_SERVE, free_port, running

BARE_FLAG = ("--logits-processors", "lenvm_vllm")


@contextlib.contextmanager
def vllm_serve(
    model: Path, log: Path, *flags: str, env: dict[str, str] | None = None
) -> Iterator[str]:
    """The base URL of a `vllm serve` of `model` under the name "tiny"."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        *VLLM_SERVE, str(model), "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "512", "--max-num-seqs", "16", *flags,
    ]  # fmt: skip
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"} | (env or {})
    with running(command, f"{url}/health", log, env):
        yield url


@contextlib.contextmanager
def value_serve(checkpoint: Path, base_model: Path, log: Path, port: int) -> Iterator[int]:
    """The process id of a value server on loopback."""
    command = [
        *VALUE_SERVER, str(checkpoint), "--base-model", str(base_model), "--port", str(port),
        "--dtype", "float32", "--threads", "1",
    ]  # fmt: skip
    with running(command, f"http://127.0.0.1:{port}/ready", log) as child:
        yield child.pid
