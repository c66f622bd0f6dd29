"""A guided vLLM and its value server for a benchmark, on loopback, with the ramp beside it."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.endpoint import Endpoint
from lenvm_vllm.commands.demo import ROOT, native_dtype
from lenvm_vllm.commands.processes import VALUE_SERVER, VLLM_SERVE, free_port, running

PROCESSORS = ("lenvm_vllm", "benchmarks.ramp:Ramp")


@contextlib.contextmanager
def value_served(
    model: str, checkpoint: Path, logs: Path, *, threads: int = 1, dtype: str | None = None
) -> Iterator[str]:
    """URL of a value server. model: hub name or folder of the backbone. dtype: of its weights."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        *(*VALUE_SERVER, str(checkpoint), "--base-model", model, "--port", str(port)),
        *("--threads", str(threads), "--dtype", dtype or native_dtype()),
    ]
    logs.mkdir(parents=True, exist_ok=True)
    with running(command, f"{url}/ready", logs / "values.log"):
        yield url


@contextlib.contextmanager
def served(
    model: str,
    checkpoint: Path,
    logs: Path,
    *,
    concurrency: int = 32,
    max_model_len: int = 4096,
    dtype: str | None = None,
    seed: int = 0,
    niceness: int = 10,
) -> Iterator[Endpoint]:
    """Both, until the block ends. model: hub name or folder, also the name it is served under.

    dtype: of both; by default what the device multiplies natively. niceness: of vLLM, whose
    engine core spins on the core that the value server wants. seed: of vLLM; a request's own
    stops its CPU build where the prompt is prefilled in chunks.
    """
    dtype = dtype or native_dtype()
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        *("nice", "-n", str(niceness), *VLLM_SERVE, model, "--host", "127.0.0.1"),
        *("--port", str(port), "--max-model-len", str(max_model_len), "--enforce-eager"),
        *("--max-num-seqs", str(concurrency), "--dtype", dtype, "--seed", str(seed)),
        *("--logits-processors", *PROCESSORS),
    ]
    with value_served(model, checkpoint, logs, dtype=dtype) as values:
        env = {"LENVM_URL": values, "LENVM_TIMEOUT_S": "30", "PYTHONPATH": str(ROOT)}
        env["VLLM_CPU_KVCACHE_SPACE"] = "2"
        with running(command, f"{url}/health", logs / "vllm.log", env):
            yield Endpoint(f"{url}/v1", model, concurrency)


@contextlib.contextmanager
def endpoint_at(
    url: str | None,
    model: str,
    checkpoint: Path,
    logs: Path,
    *,
    concurrency: int,
    dtype: str | None,
    seed: int,
) -> Iterator[Endpoint]:
    """The one at `url`, else servers of our own for as long as the block."""
    if url:
        yield Endpoint(url.rstrip("/"), model, concurrency)
        return
    how: dict[str, Any] = {"concurrency": concurrency, "dtype": dtype, "seed": seed}
    with served(model, checkpoint, logs, **how) as own:
        yield own


def digest(checkpoint: Path) -> str:
    """Of a checkpoint's files: answers under another one are not the same run."""
    total = hashlib.sha256()
    for file in [*sorted(checkpoint.glob("*.safetensors")), checkpoint / "config.json"]:
        total.update(file.read_bytes())
    return total.hexdigest()[:16]
