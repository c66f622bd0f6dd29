"""The commands `lenvm serve` and `vllm serve`, as servers on loopback that we start ourselves.

The demo, the benchmarks and the tests make theirs here; each is up within its `with` block.
"""

import sys
from pathlib import Path

from lenvm_vllm.commands.processes import Server, free_port
from lenvm_vllm.host import machine

HOST = "127.0.0.1"
LENVM = (sys.executable, "-m", "lenvm_vllm.commands.cli")
VLLM = (sys.executable, "-m", "lenvm_vllm.vllm_cli")


def lenvm_serve(
    checkpoint: Path,
    log: Path,
    *flags: object,
    base_model: str | Path | None = None,
    threads: int = 1,
    port: int | None = None,
    uds: Path | None = None,
    env: dict[str, str] | None = None,
) -> Server:
    """A value server, not started yet.

    flags: more of `lenvm serve`. base_model: where the checkpoint does not say it. port: by default
    a free one. uds: a Unix socket to listen on instead.
    """
    port = port or free_port()
    place = ("--uds", uds) if uds else ("--host", HOST, "--port", port)
    base = ("--base-model", base_model) if base_model else ()
    command = (*LENVM, "serve", checkpoint, *base, "--threads", threads, *place, *flags)
    url = f"http://{HOST}:{port}"
    return Server([str(part) for part in command], url, "/ready", log, env or {}, uds)


def vllm_serve(
    model: str | Path,
    log: Path,
    *flags: object,
    values_url: str | None = None,
    port: int | None = None,
    env: dict[str, str] | None = None,
) -> Server:
    """A vLLM, not started yet; nothing of it is compiled, which takes longer than it saves here.

    flags: more of `vllm serve`, of which the last one counts. values_url: of the value server that
    guides it; None for a vLLM without the plugin. port: by default a free one.
    """
    port = port or free_port()
    command = [
        *(*VLLM, "serve", model, "--host", HOST, "--port", port, "--enforce-eager"),
        *("--dtype", native_dtype(), "--max-model-len", 2048, "--max-num-seqs", 16),
    ]
    # By default vLLM ends a connection that was idle for 5 s, as httpx does: a request may come
    # just then.
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600"}
    env = own | (env or {})
    if values_url:
        command += ["--logits-processors", "lenvm_vllm"]
        env = {"LENVM_URL": values_url} | env
    url = f"http://{HOST}:{port}"
    return Server([str(part) for part in (*command, *flags)], url, "/health", log, env)


def native_dtype() -> str:
    """For vLLM and a value server, of a model in bfloat16."""
    return "bfloat16" if machine.has_bfloat16() else "float32"
