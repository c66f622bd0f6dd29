"""What the plugin costs: throughput and inter-token latency of a real vLLM, with and without it.

    python -m benchmarks.systems.overhead

Two vLLM servers of the small real model, one without the plugin, and a value server with the
shipped checkpoint, on the same cores; whichever vLLM is not measured is stopped. All requests of
all arms have the same number of tokens: unguided by `ignore_eos`, guided by an exact target,
tilted by `min_tokens`.
"""

import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cyclopts import App

from benchmarks.metrics import metrics
from benchmarks.provenance import end
from benchmarks.servers import Models
from benchmarks.systems.disturb import awake, paused
from benchmarks.systems.load import bench, write_prompts
from lenvm_vllm.commands.demo.questions import PROMPTS
from lenvm_vllm.commands.processes import Server
from lenvm_vllm.commands.servers import lenvm_serve, vllm_serve

app = App(help=__doc__)


def arms(tokens: int) -> dict[str, tuple[bool, dict[str, Any]]]:
    """Name → whether the server has the plugin, and what its requests ask for."""
    exact = {"tokens": tokens, "tolerance": 0.0}
    tilt = {"mode": "tilt", "beta": -1.0}  # the plugin's own cut: min_p 0.01
    return {
        "plain": (False, {"ignore_eos": True}),
        "idle": (True, {"ignore_eos": True}),
        "guided": (True, {"length_target": exact}),
        "tilt": (True, {"length_target": tilt, "min_tokens": tokens}),
    }


@contextmanager
def servers(models: Models, folder: Path, threads: int) -> Iterator[tuple[Server, Server]]:
    """vLLM without and with the plugin, both stopped. threads: of the value server."""
    log, model = folder / "values.log", models.model
    values = lenvm_serve(models.checkpoint, log, base_model=models.backbone, threads=threads)
    flags = ("--max-num-seqs", 32, *models.flags)
    plain, plugin = (
        vllm_serve(model, folder / log, *flags, values_url=url)
        for log, url in (("plain.log", None), ("plugin.log", values.url))
    )
    with values, plain, paused(plain), plugin, paused(plugin):
        yield plain, plugin


def rates_of(
    both: tuple[Server, Server],
    models: Models,
    size: int,
    tokens: int,
    rounds: int,
    folder: Path,
) -> dict[str, list[float]]:
    """Tokens a second of each arm in each round, `size` requests at a time; and of each steered
    arm the share of its rows that had values in time, 0 to 1, as `valued` and its name.

    The round before them is not among them: in it the first arms find cold servers.
    """
    count = max(2 * size, 4)
    texts = [f"{PROMPTS[number % len(PROMPTS)]} ({number})" for number in range(count)]
    prompts = write_prompts(texts, folder / "prompts.jsonl")
    flags = (
        *("--num-prompts", count, "--num-warmups", min(size, 4)),
        *("--max-concurrency", size, "--custom-output-len", tokens),
    )
    rates: dict[str, list[float]] = {arm: [] for arm in arms(tokens)}
    for number in range(1 + rounds):
        for arm, (plugin, fields) in arms(tokens).items():
            with awake(both[plugin]) as server:
                before = Counter(metrics(server.url))
                report = bench(server.url, (models.name, models.model), prompts, fields, *flags)
                spent = Counter(metrics(server.url)) - before
            assert report["total_output_tokens"] == count * tokens, arm
            print(f"{size:3} {arm:7} {told(report, spent)}", file=sys.stderr, flush=True)
            if number == 0:
                continue
            rates[arm].append(report["output_throughput"])
            if rows := spent["lenvm_rows_total"]:
                valued = rates.setdefault(f"valued {arm}", [])
                valued.append(spent["lenvm_valued_rows_total"] / rows)
    return rates


def told(report: dict[str, Any], spent: Counter[str]) -> str:
    """A line about one run. spent: the plugin's metrics of it: where a guided step's time goes."""
    line = (
        f"{report['output_throughput']:7.1f} tokens/s, between tokens"
        f" {report['median_itl_ms']:.1f} ms (p99 {report['p99_itl_ms']:.1f})"
    )
    if not (steps := spent["lenvm_steps_total"]):
        return line
    plan, value = (
        spent[f"lenvm_{name}_seconds_total"] * 1000 / steps for name in ("plan", "value")
    )
    share = spent["lenvm_valued_rows_total"] / max(1, spent["lenvm_rows_total"])
    return f"{line}, a step {plan:.1f} ms, {value:.1f} of it waiting; {share:.0%} had values"


@app.default
def main(
    *,
    models: Models = Models(),
    concurrency: tuple[int, ...] = (1, 8, 32),
    tokens: int = 128,
    rounds: int = 3,
    threads: int = 2,
) -> None:
    """Measure and print one JSON line.

    Parameters
    ----------
    concurrency
        Requests at a time, each a row of the result.
    tokens
        Of each answer.
    rounds
        Of all arms one after the other, behind one that does not count; the ratios are medians over
        rounds.
    threads
        Of the value server.
    """
    ratios: dict[str, dict[str, float]] = {"idle": {}, "guided": {}, "tilt": {}}
    valued: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, servers(models, Path(name), threads) as both:
        for size in concurrency:
            rates = rates_of(both, models, size, tokens, rounds, Path(name))
            for arm, ratio in ratios.items():
                pairs = zip(rates[arm], rates["plain"], strict=True)
                ratio[str(size)] = round(statistics.median(a / b for a, b in pairs), 3)
            shares = rates["valued guided"] + rates["valued tilt"]
            valued[str(size)] = round(statistics.median(shares), 3)
    idle = round(statistics.median(ratios["idle"].values()), 3)
    result = {"plugin_idle_ratio": idle, "guided_ratio": ratios["guided"]}
    result |= {"tilt_ratio": ratios["tilt"], "idle_ratio": ratios["idle"]}
    end({**result, "valued_share": valued})


if __name__ == "__main__":
    app()
