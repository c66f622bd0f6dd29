"""What the plugin costs: throughput and inter-token latency of a real vLLM, with and without it.

    python -m benchmarks.systems.overhead

Two vLLM servers of the small real model, one without the plugin, and a value server with the
shipped checkpoint, on the same cores; whichever vLLM is not measured is stopped. All requests of
all arms have the same number of tokens: unguided by `ignore_eos`, guided by an exact target,
tilted by `min_tokens`.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from cyclopts import App
from tqdm import tqdm

from benchmarks.systems.load import bench, write_prompts
from lenvm_vllm.commands.demo import CHECKPOINT, MODEL, NAME
from lenvm_vllm.commands.demo_answers import PROMPTS
from lenvm_vllm.commands.processes import VALUE_SERVER, VLLM_SERVE, free_port, running

app = App(help=__doc__)
Server = tuple[str, subprocess.Popen[bytes]]


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


@contextlib.contextmanager
def servers(
    folder: Path, threads: int, dtype: str, niceness: int
) -> Iterator[tuple[Server, Server]]:
    """vLLM without and with the plugin: URL and process of each."""
    value_url = f"http://127.0.0.1:{(value_port := free_port())}"
    value_server = [
        *(*VALUE_SERVER, str(CHECKPOINT), "--base-model", str(MODEL)),
        *("--port", str(value_port), "--threads", str(threads)),
    ]
    env = {"LENVM_URL": value_url, "LENVM_TIMEOUT_S": "30", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with contextlib.ExitStack() as stack:
        log = folder / "values.log"
        stack.enter_context(running(value_server, f"{value_url}/ready", log, env))
        started = []
        for name, more in (("plain", ()), ("plugin", ("--logits-processors", "lenvm_vllm"))):
            url = f"http://127.0.0.1:{(port := free_port())}"
            command = [
                *("nice", "-n", str(niceness), *VLLM_SERVE, str(MODEL)),
                *("--served-model-name", NAME, "--port", str(port)),
                *("--host", "127.0.0.1", "--max-model-len", "2048", "--max-num-seqs", "32"),
                *("--enforce-eager", "--dtype", dtype, *more),
            ]
            vllm = running(command, f"{url}/health", folder / f"{name}.log", env)
            started.append((url, stack.enter_context(vllm)))
            os.killpg(started[-1][1].pid, signal.SIGSTOP)
        try:
            yield started[0], started[1]
        finally:
            for _, process in started:
                os.killpg(process.pid, signal.SIGCONT)


@contextlib.contextmanager
def awake(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A stopped server runs for as long as the block."""
    os.killpg(process.pid, signal.SIGCONT)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGSTOP)


def steering_seconds(url: str) -> Counter[str]:
    """Steps with guided rows so far, and the seconds they took, by the plugin's own metrics."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    pairs = (line.split() for line in lines if line.startswith("lenvm_"))
    return Counter({name: float(value) for name, value in pairs})


def steering(spent: Counter[str]) -> str:
    """Where a guided step's time goes, to print; nothing without such steps."""
    if not (steps := spent["lenvm_steps_total"]):
        return ""
    plan, value = (
        spent[f"lenvm_{name}_seconds_total"] * 1000 / steps for name in ("plan", "value")
    )
    return f", a step {plan:.1f} ms, {value:.1f} of it in the value server"


@app.default
def main(
    *,
    concurrency: tuple[int, ...] = (1, 8, 32),
    tokens: int = 128,
    rounds: int = 3,
    threads: int = 2,
    niceness: int = 10,
    dtype: str = "auto",
) -> None:
    """Measure and print one JSON line.

    Parameters
    ----------
    concurrency
        Requests at a time, each a row of the result.
    tokens
        Of each answer.
    rounds
        Of all arms one after the other; the ratios are medians over rounds.
    threads
        Of the value server.
    niceness
        Of vLLM, whose engine core spins on the core that the value server wants.
    dtype
        Of vLLM.
    """
    ratios: dict[str, dict[str, float]] = {"idle": {}, "guided": {}, "tilt": {}}
    table = arms(tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            servers(folder, threads, dtype, niceness) as both,
            tqdm(total=rounds * len(concurrency) * len(table), file=sys.stderr) as bar,
        ):
            for size in concurrency:
                count = max(2 * size, 4)
                texts = [f"{PROMPTS[i % len(PROMPTS)]} ({i})" for i in range(count)]
                prompts = write_prompts(texts, folder / "prompts.jsonl")
                flags = [
                    *("--num-prompts", str(count), "--num-warmups", str(min(size, 4))),
                    *("--max-concurrency", str(size), "--custom-output-len", str(tokens)),
                ]
                rates: dict[str, list[float]] = {arm: [] for arm in table}
                for _ in range(rounds):
                    for arm, (plugin, fields) in table.items():
                        url, process = both[plugin]
                        with awake(process):
                            before = steering_seconds(url)
                            report = bench(url, (NAME, MODEL), prompts, fields, *flags)
                            spent = steering_seconds(url) - before
                        assert report["total_output_tokens"] == count * tokens, arm
                        rates[arm].append(report["output_throughput"])
                        bar.update()
                        bar.write(
                            f"{size:3} {arm:7} {rates[arm][-1]:7.1f} tokens/s, between tokens"
                            f" {report['median_itl_ms']:.1f} ms (p99 {report['p99_itl_ms']:.1f})"
                            + steering(spent),
                            file=sys.stderr,
                        )
                for arm, ratio in ratios.items():
                    pairs = zip(rates[arm], rates["plain"], strict=True)
                    ratio[str(size)] = round(statistics.median(a / b for a, b in pairs), 3)
    idle = round(statistics.median(ratios["idle"].values()), 3)
    result = {"plugin_idle_ratio": idle, "guided_ratio": ratios["guided"]}
    print(json.dumps({**result, "tilt_ratio": ratios["tilt"], "idle_ratio": ratios["idle"]}))


if __name__ == "__main__":
    app()
