"""A guided vLLM and its value server for a benchmark, on loopback."""

import hashlib
import shlex
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from cyclopts import Parameter

from benchmarks.endpoint import Endpoint
from lenvm_vllm.commands.demo import CHECKPOINT, MODEL
from lenvm_vllm.commands.servers import lenvm_serve, native_dtype, vllm_serve


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Models:
    """What a benchmark of systems serves."""

    model: Path = MODEL
    """Folder of the model that vLLM serves, under the folder's name."""
    checkpoint: Path = CHECKPOINT
    """Its value model."""
    base_model: Path | None = None
    """Folder of the value model's backbone, where that is another than `model`."""
    vllm_flags: str = ""
    """More of `vllm serve`, in one text: `--vllm-flags="--gpu-memory-utilization 0.3"`."""

    @property
    def name(self) -> str:
        """That the model is served under."""
        return self.model.name

    @property
    def backbone(self) -> Path:
        """Of the value model."""
        return self.base_model or self.model

    @property
    def flags(self) -> list[str]:
        """Of `vllm serve`; the last ones count."""
        return ["--served-model-name", self.name, *shlex.split(self.vllm_flags)]


@contextmanager
def value_served(
    model: str, checkpoint: Path, logs: Path, dtype: str | None = None
) -> Iterator[str]:
    """URL of a value server. model: hub name or folder of the backbone. dtype: of its weights."""
    logs.mkdir(parents=True, exist_ok=True)
    flags = ("--dtype", dtype or native_dtype())
    with lenvm_serve(checkpoint, logs / "values.log", *flags, base_model=model) as server:
        yield server.url


@contextmanager
def served(
    model: str,
    checkpoint: Path,
    logs: Path,
    *,
    concurrency: int = 32,
    max_model_len: int = 4096,
    dtype: str | None = None,
    seed: int = 0,
    ramp: bool = False,
    more: Sequence[str] = (),
) -> Iterator[Endpoint]:
    """Both, until the block ends. model: hub name or folder, also the name it is served under.

    dtype: of both; by default what the device multiplies natively. seed: of vLLM; a request's own
    stops its CPU build where the prompt is prefilled in chunks. ramp: with the ramp beside the
    plugin, for which vLLM takes Model Runner V1; V2 does not start with it. more: flags of
    `vllm serve`.
    """
    flags = (
        *("--max-model-len", max_model_len, "--max-num-seqs", concurrency, "--seed", seed),
        *(("--dtype", dtype) if dtype else ()),
        *(("--logits-processors", "benchmarks.ramp:Ramp", "lenvm_vllm") if ramp else ()),
        *more,
    )
    env = {"LENVM_TIMEOUT_S": "30", "LENVM_WAIT_FLOOR_S": "30", "VLLM_CPU_KVCACHE_SPACE": "2"}
    env |= {"VLLM_USE_V2_MODEL_RUNNER": "0"} if ramp else {}
    log = logs / "vllm.log"
    with (
        value_served(model, checkpoint, logs, dtype) as values,
        vllm_serve(model, log, *flags, values_url=values, env=env) as vllm,
    ):
        yield Endpoint(f"{vllm.url}/v1", model, concurrency)


def endpoint_at(
    url: str | None,
    model: str,
    checkpoint: Path,
    logs: Path,
    *,
    concurrency: int,
    max_model_len: int,
    dtype: str | None,
    seed: int,
    ramp: bool,
) -> AbstractContextManager[Endpoint]:
    """The one at `url`, else servers of our own for as long as the block."""
    if url:
        return nullcontext(Endpoint(url.rstrip("/"), model, concurrency))
    return served(
        model,
        checkpoint,
        logs,
        concurrency=concurrency,
        max_model_len=max_model_len,
        dtype=dtype,
        seed=seed,
        ramp=ramp,
    )


def digest(checkpoint: Path) -> str:
    """Of a checkpoint's files: answers under another one are not the same run."""
    total = hashlib.sha256()
    for file in [*sorted(checkpoint.glob("*.safetensors")), checkpoint / "config.json"]:
        total.update(file.read_bytes())
    return total.hexdigest()[:16]
