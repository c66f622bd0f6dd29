"""Real processes for the end-to-end tests: each in its own group, killed with it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

VLLM = Path(__file__).parents[1] / "scripts" / "vllm_cli.py"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def process(
    command: list[str], health_url: str, log: Path, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A running server. Raises RuntimeError with the end of its log when it does not come up."""
    with log.open("wb") as out:
        server = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | (env or {}),
        )
    try:
        _wait(server, health_url, log)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(20)


def _wait(server: subprocess.Popen[bytes], health_url: str, log: Path) -> None:
    for _ in range(300):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(health_url, timeout=2, trust_env=False).status_code == 200:
                return
        if server.poll() is not None:
            break
        time.sleep(1)
    raise RuntimeError(f"{health_url} did not come up:\n{log.read_text()[-4000:]}")


@contextlib.contextmanager
def vllm_serve(
    model: Path, log: Path, *flags: str, env: dict[str, str] | None = None
) -> Iterator[str]:
    """The base URL of a `vllm serve` with the plugin, small enough for two cores."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        sys.executable, str(VLLM), "serve", str(model), "--port", str(port),
        "--host", "127.0.0.1", "--max-model-len", "512", "--max-num-seqs", "16",
        "--enforce-eager", "--served-model-name", "tiny", "--logits-processors", "lenvm_vllm",
        *flags,
    ]  # fmt: skip
    with process(command, f"{url}/health", log, {"VLLM_CPU_KVCACHE_SPACE": "1"} | (env or {})):
        yield url
