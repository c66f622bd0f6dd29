"""Load on a running vLLM by its own `vllm bench serve`."""

import json
import subprocess
from pathlib import Path
from typing import Any

from lenvm_vllm.commands.servers import VLLM


def write_prompts(prompts: list[str], path: Path) -> Path:
    """One JSON object a line, as the benchmark reads them; returns `path`."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def bench(
    url: str, model: tuple[str, Path], prompts: Path, fields: dict[str, Any], *flags: object
) -> dict[str, Any]:
    """Chat completions, streamed, at T = 1; the result as vLLM writes it.

    model: as it is served, and where its tokenizer lies. fields: added to each request. flags:
    of `vllm bench serve`, for how many, how fast and how long. Raises RuntimeError where a
    request failed.
    """
    name, tokenizer = model
    result = prompts.with_suffix(".result.json")
    command = [
        *(*VLLM, "bench", "serve", "--backend", "openai-chat"),
        *("--base-url", url, "--endpoint", "/v1/chat/completions"),
        *("--model", name, "--tokenizer", str(tokenizer)),
        *("--dataset-name", "custom", "--dataset-path", str(prompts)),
        *("--skip-chat-template", "--disable-shuffle", "--disable-tqdm"),
        *("--extra-body", json.dumps({"temperature": 1.0, **fields})),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99"),
        *("--save-result", "--result-dir", str(result.parent)),
        *("--result-filename", result.name, *map(str, flags)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"vllm bench serve: {(done.stdout + done.stderr)[-2000:]}")
    report: dict[str, Any] = json.loads(result.read_text())
    if report["failed"]:
        raise RuntimeError(f"{report['failed']} requests failed: {done.stdout[-2000:]}")
    return report
