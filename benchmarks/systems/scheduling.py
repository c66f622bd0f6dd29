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

from benchmarks.provenance import end
from benchmarks.systems.load import bench, write_prompts
from lenvm_vllm.commands.demo import CHECKPOINT, MODEL, NAME
from lenvm_vllm.commands.servers import lenvm_serve, vllm_serve

app = App(help=__doc__)
ARMS = {"fcfs": "fcfs", "forecast": "priority"}  # scheduling policies


def read_prompts(data: Path, count: int, seed: int) -> list[str]:
    """`count` values of the field `prompt` at random; JSONL, plain or gzipped."""
    raw = data.read_bytes()
    lines = (gzip.decompress(raw) if data.suffix == ".gz" else raw).splitlines()
    prompts = [str(json.loads(line)["prompt"]) for line in lines]
    short = [prompt for prompt in prompts if len(prompt) < 2000]
    return random.Random(seed).sample(short, count)


def seconds(report: dict[str, Any]) -> dict[str, float]:
    """From a request to its last token, of a result of `vllm bench serve`."""
    kinds = ("mean", "median", "p99")
    return {kind: round(report[f"{kind}_e2el_ms"] / 1000, 2) for kind in kinds}


@app.default
def main(
    *,
    data: Path,
    limit: int = 120,
    rate: float = 1.0,
    max_tokens: int = 512,
    max_num_seqs: int = 8,
    seed: int = 0,
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
    """
    load = ("--num-prompts", limit, "--custom-output-len", max_tokens, "--request-rate", rate)
    flags = (
        *("--served-model-name", NAME, "--max-num-seqs", max_num_seqs),
        *("--max-num-batched-tokens", 16384, "--scheduling-policy"),
    )
    env = {"LENVM_FORECAST": "true"}
    result: dict[str, Any] = {"requests": limit, "rate": rate}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = write_prompts(read_prompts(data, limit, seed), folder / "prompts.jsonl")
        with lenvm_serve(CHECKPOINT, folder / "values.log", base_model=MODEL) as values:
            for arm, policy in tqdm(ARMS.items(), file=sys.stderr):
                log, url = folder / f"{arm}.log", values.url
                with vllm_serve(MODEL, log, *flags, policy, values_url=url, env=env) as vllm:
                    report = bench(
                        vllm.url, (NAME, MODEL), prompts, {"seed": seed}, *load, "--seed", seed
                    )
                result[arm] = seconds(report) | {"tokens": report["total_output_tokens"]}
    for kind in ("mean", "p99"):
        result[f"{kind}_ratio"] = round(result["forecast"][kind] / result["fcfs"][kind], 3)
    end(result)


if __name__ == "__main__":
    app()
