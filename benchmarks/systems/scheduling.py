"""Does a predicted length shorten the queue? First come first served against shortest first.

    python -m benchmarks.systems.scheduling --data prompts.jsonl

A vLLM for each arm, under `--scheduling-policy` fcfs and priority; in both the plugin asks
`/v1/predict`, in the second it sets the priority by the answer. Arrivals are a Poisson process,
the same in both arms.
"""

import gzip
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from cyclopts import App
from tqdm import tqdm

from benchmarks.systems.load import bench, write_prompts
from lenvm_vllm.commands.demo import CHECKPOINT, MODEL, NAME
from lenvm_vllm.commands.processes import VALUE_SERVER, VLLM_SERVE, free_port, running

app = App(help=__doc__)
ARMS = {"fcfs": "fcfs", "forecast": "priority"}  # scheduling policies


def read_prompts(data: Path, count: int, seed: int) -> list[str]:
    """`count` values of the field `prompt` at random; JSONL, plain or gzipped."""
    raw = data.read_bytes()
    lines = (gzip.decompress(raw) if data.suffix == ".gz" else raw).decode().splitlines()
    prompts = [str(json.loads(line)["prompt"]) for line in lines]
    short = [prompt for prompt in prompts if len(prompt) < 2000]
    return random.Random(seed).sample(short, count)


@app.default
def main(
    *,
    data: Path,
    limit: int = 120,
    rate: float = 1.0,
    max_tokens: int = 512,
    max_num_seqs: int = 8,
    seed: int = 0,
    dtype: str = "auto",
) -> None:
    """Measure and print one JSON line, latencies in seconds.

    Parameters
    ----------
    data
        JSONL with a field `prompt`.
    limit
        Requests.
    rate
        Of them a second.
    max_tokens
        Of each answer.
    max_num_seqs
        That vLLM runs at a time; the others wait.
    seed
        Of the choice, the arrivals and the answers.
    dtype
        Of vLLM.
    """
    value_url = f"http://127.0.0.1:{(value_port := free_port())}"
    url = f"http://127.0.0.1:{(port := free_port())}"
    value_server = [
        *(*VALUE_SERVER, str(CHECKPOINT), "--base-model", str(MODEL)),
        *("--port", str(value_port), "--threads", "1"),
    ]
    vllm = [
        *(*VLLM_SERVE, str(MODEL), "--served-model-name", NAME, "--port", str(port)),
        *("--host", "127.0.0.1", "--max-model-len", "2048", "--dtype", dtype, "--enforce-eager"),
        *("--max-num-seqs", str(max_num_seqs), "--max-num-batched-tokens", "16384"),
        *("--logits-processors", "lenvm_vllm", "--scheduling-policy"),
    ]
    env = {"LENVM_URL": value_url, "LENVM_FORECAST": "true", "VLLM_CPU_KVCACHE_SPACE": "1"}
    flags = [
        *("--num-prompts", str(limit), "--custom-output-len", str(max_tokens)),
        *("--request-rate", str(rate), "--seed", str(seed)),
    ]
    result: dict[str, Any] = {"requests": limit, "rate": rate}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = write_prompts(read_prompts(data, limit, seed), folder / "prompts.jsonl")
        with running(value_server, f"{value_url}/ready", folder / "values.log", env):
            for arm, policy in tqdm(ARMS.items(), file=sys.stderr):
                with running([*vllm, policy], f"{url}/health", folder / f"{arm}.log", env):
                    report = bench(url, (NAME, MODEL), prompts, {"seed": seed}, *flags)
                result[arm] = {
                    kind: round(report[f"{kind}_e2el_ms"] / 1000, 2)
                    for kind in ("mean", "median", "p99")
                } | {"tokens": report["total_output_tokens"]}
    result["mean_ratio"] = round(result["forecast"]["mean"] / result["fcfs"]["mean"], 3)
    result["p99_ratio"] = round(result["forecast"]["p99"] / result["fcfs"]["p99"], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    app()
