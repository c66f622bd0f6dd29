"""Does a predicted length shorten the queue? First come first served against shortest first.

    python -m benchmarks.systems.scheduling --data prompts.jsonl

A vLLM and a value server on the same machine, new ones for each arm and seed. Arrivals are a
Poisson process, the same in all arms of a seed. What was measured is kept in --output: the same
command goes on from there. (`queueing` simulates what this measures.)

fcfs      first come, first served; nothing is asked
asked     the same, but the plugin asks `/v1/predict`: what a forecast costs
forecast  `--scheduling-policy priority`: the plugin asks, and sets the priority by the answer
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

from benchmarks.estimates import Sample, estimate
from benchmarks.provenance import end
from benchmarks.servers import Models, digest
from benchmarks.systems.load import bench, write_prompts
from lenvm_vllm.commands.servers import lenvm_serve, vllm_serve
from trainer.checks import check_positive
from trainer.output import OnlyJson, table
from trainer.resume import fingerprint, keep_settings
from trainer.rows import Rows

app = App(help=__doc__)
# Scheduling policies, and whether the plugin asks for forecasts.
ARMS = {"fcfs": ("fcfs", False), "asked": ("fcfs", True), "forecast": ("priority", True)}
KINDS = ("mean", "median", "p99")


def read_prompts(data: Path, count: int, seed: int) -> list[str]:
    """`count` values of the field `prompt` at random; JSONL, plain or gzipped."""
    raw = data.read_bytes()
    lines = (gzip.decompress(raw) if data.suffix == ".gz" else raw).splitlines()
    prompts = [str(json.loads(line)["prompt"]) for line in lines]
    short = [prompt for prompt in prompts if len(prompt) < 2000]
    return random.Random(seed).sample(short, count)


def seconds(report: dict[str, Any]) -> dict[str, float]:
    """From a request to its last token, of a result of `vllm bench serve`."""
    return {kind: report[f"{kind}_e2el_ms"] / 1000 for kind in KINDS}


def figures(runs: list[dict[str, dict[str, float]]], requests: int) -> list[dict[str, Any]]:
    """A row for each arm: seconds, and over those of fcfs in the same run; intervals of runs.

    runs: by arm what `seconds` says. n: requests of all runs.
    """
    names = [str(run) for run in range(len(runs))]
    rows = []
    for arm in ARMS:
        row: dict[str, Any] = {"arm": arm}
        for kind in KINDS:
            row[f"{kind} s"] = estimate(Sample([run[arm][kind] for run in runs], names))
            ratios = [run[arm][kind] / run["fcfs"][kind] for run in runs]
            row[f"{kind} ratio"] = estimate(Sample(ratios, names))
        tokens = [run[arm]["tokens"] for run in runs]
        rows.append(row | {"tokens": sum(tokens), "runs": len(runs), "n": requests * len(runs)})
    return rows


@app.default
def main(
    *,
    data: Path,
    models: Models = Models(),
    limit: int = 300,
    rate: float = 1.0,
    max_tokens: int = 512,
    max_num_seqs: int = 8,
    seeds: int = 3,
    output: Path = Path("runs/scheduling"),
    only_json: OnlyJson = False,
) -> None:
    """Measure, print a table and, as the last line, one JSON object; latencies in seconds.

    Parameters
    ----------
    data
        JSONL with a field `prompt`.
    limit
        Requests of each run.
    rate
        Of them a second.
    max_tokens
        Of each answer.
    max_num_seqs
        That vLLM runs at a time; the others wait.
    seeds
        Runs of each arm; a seed is that of the choice, the arrivals and the answers. A larger
        number goes on from a smaller one.
    output
        Folder of what each run measured.
    """
    check_positive(limit=limit, rate=rate, max_tokens=max_tokens, seeds=seeds)
    load: dict[str, float] = {"requests": limit, "rate": rate, "max_tokens": max_tokens}
    load["max_num_seqs"] = max_num_seqs
    prompts = fingerprint(read_prompts(data, limit, seed=0))
    made_with = {"model": models.name, "value_model": digest(models.checkpoint)}
    keep_settings(output, {**made_with, "prompts": prompts, **load})
    runs = Rows(output / "runs.jsonl")
    missing = [
        (seed, arm) for seed in range(seeds) for arm in ARMS if key_of(seed, arm) not in runs
    ]
    for seed, arm in tqdm(missing, file=sys.stderr):
        found = _run(models, arm, seed, read_prompts(data, limit, seed), load)
        runs.add({"key": key_of(seed, arm), **found})
    rows = figures([{arm: runs[key_of(seed, arm)] for arm in ARMS} for seed in range(seeds)], limit)
    end({**load, "rows": rows}, table(rows), only_json)


def key_of(seed: int, arm: str) -> str:
    """Of a run's row."""
    return f"{seed}/{arm}"


def _run(
    models: Models, arm: str, seed: int, prompts: list[str], load: dict[str, float]
) -> dict[str, float]:
    """What `seconds` says of one arm, and the tokens of its answers."""
    policy, asks = ARMS[arm]
    flags = (
        *("--max-num-seqs", load["max_num_seqs"], "--max-num-batched-tokens", 16384),
        *("--scheduling-policy", policy, *models.flags),
    )
    asked = (
        *("--num-prompts", load["requests"], "--custom-output-len", load["max_tokens"]),
        *("--request-rate", load["rate"], "--seed", seed),
    )
    env = {"LENVM_FORECAST": str(asks).lower()}
    with (
        tempfile.TemporaryDirectory() as name,
        lenvm_serve(
            models.checkpoint, Path(name) / "values.log", base_model=models.backbone
        ) as values,
        vllm_serve(
            models.model, Path(name) / "vllm.log", *flags, values_url=values.url, env=env
        ) as vllm,
    ):
        file = write_prompts(prompts, Path(name) / "prompts.jsonl")
        report = bench(vllm.url, (models.name, models.model), file, {"seed": seed}, *asked)
    return seconds(report) | {"tokens": report["total_output_tokens"]}


if __name__ == "__main__":
    app()
