"""What does a step cost? Our engine against the usual ways to score candidates.

    python -m benchmarks.systems.scoring --model MODEL [--checkpoint CHECKPOINT]

A step: each session emits one of its candidates and asks for K new ones behind a prefix of P
tokens. The baselines (baselines.py) have the same weights, in the faster of float32 and the
engine's own type, and equal prefixes, which suits them.

Ceiling: the larger of weight bytes over read bandwidth and FLOPs over the rate of matrix
products, both measured in this run. Device, weights and torch.compile of the engine are those of
`lenvm serve`, by its variables (LENVM_SERVER_DTYPE and so on).
"""

import gc
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cyclopts import App
from tqdm import tqdm
from transformers.utils import logging

from benchmarks.provenance import end
from benchmarks.systems.baselines import Baselines
from benchmarks.systems.step_over_http import overhead_ms
from benchmarks.systems.timing import best_ms
from trainer.output import table
from value_server.contract.checkpoint import LenvmConfig
from value_server.engine.engine import Engine
from value_server.engine.job import Job, Row
from value_server.engine.linear import compute_dtype, weight_dtype
from value_server.model.backbone import load_backbone
from value_server.model.value_model import ValueHead, ValueModel
from value_server.serve import load
from value_server.settings import ServerSettings

app = App(help=__doc__)
SESSIONS, PREFIXES, CANDIDATES = (1, 8, 32), (128, 512, 2048), (5, 15)
HEADLINE, HEADLINE_OF_MANY = (1, 512, 15), (32, 512, 15)
ALL = [(b, p, k) for b in SESSIONS for p in PREFIXES for k in CANDIDATES]

USUAL = ("reforward", "copy", "tree")
Step = dict[str, Any]  # sessions, prefix, candidates and times in ms; None where one was left out


@dataclass(frozen=True)
class Ceiling:
    """weight_bytes, flops_per_token: of the linear layers."""

    weight_bytes: int
    flops_per_token: float
    bytes_per_s: float
    flops_per_s: float

    def ms(self, tokens: int) -> float:
        reading = self.weight_bytes / self.bytes_per_s
        return 1e3 * max(reading, tokens * self.flops_per_token / self.flops_per_s)


def measure_ceiling(model: ValueModel, weights: torch.dtype, compute: torch.dtype) -> Ceiling:
    """Read bandwidth from a sum over 400 MB, GEMM rate as the best of the types at 2048³."""
    device = next(model.parameters()).device
    linears = [m for m in model.backbone.modules() if isinstance(m, torch.nn.Linear)]
    parameters = sum(m.weight.numel() for m in linears)
    big = torch.ones(100 << 20, device=device)
    bandwidth = big.numel() * 4 / (best_ms(big.sum, 5) / 1e3)
    rates = []
    for kind in {torch.float32, torch.bfloat16, compute}:
        a = torch.randn(2048, 2048, device=device, dtype=kind)
        rates.append(2 * 2048**3 / (best_ms(partial(torch.matmul, a, a), 3) / 1e3))
    return Ceiling(parameters * weights.itemsize, 2.0 * parameters, bandwidth, max(rates))


class Ours:
    """Sessions of an engine that step for ever."""

    def __init__(self, engine: Engine, sessions: int, prefix: int, candidates: int) -> None:
        self.engine, self.length = engine, prefix
        self.candidates = list(range(1000, 1000 + candidates))
        self.names = [f"s{i}" for i in range(sessions)]
        draw = random.Random(0)
        for name in self.names:
            prompt = [draw.randrange(engine.vocab_size) for _ in range(prefix)]
            engine.cache.update(name, 0, prompt, ())
        # As if the prefixes had been computed: their keys and values do not change the time.
        for name in self.names:
            session = engine.cache.sessions[name]
            for slot in session.path:
                engine.cache.ready[slot] = 1
            engine.cache.unpin(session)
        engine.run(Job([Row(name, prefix, [], self.candidates) for name in self.names]))

    def step(self) -> None:
        emitted = [self.candidates[0]]
        rows = [Row(name, self.length, emitted, self.candidates) for name in self.names]
        self.engine.run(Job(rows))
        self.length += 1

    def close(self) -> None:
        for name in self.names:
            self.engine.cache.close(name)


@torch.inference_mode()
def measure(
    checkpoint: Path,
    settings: ServerSettings,
    shapes: Sequence[tuple[int, int, int]],
    repeats: int,
) -> dict[str, Any]:
    """Steps of all shapes (B, P, K), ceiling and memory of one value model."""
    engine = load(checkpoint, settings)
    weights, device = weight_dtype(settings.dtype, engine.device), engine.device
    compute = compute_dtype(weights, device)
    plain = ValueModel.load(checkpoint, settings.base_model, compute).to(device)
    ceiling = measure_ceiling(plain, weights, compute)
    steps: list[Step] = []
    for shape in tqdm(shapes):
        sessions, prefix, candidates = shape
        ours = Ours(engine, *shape)
        row: Step = {"sessions": sessions, "prefix": prefix, "candidates": candidates}
        row |= {"ours": best_ms(ours.step, repeats), "ceiling": ceiling.ms(sessions * candidates)}
        ours.close()
        usual = Baselines(plain, *shape)
        steps.append(row | usual.times(repeats, shape == HEADLINE, engine.pool.bytes_per_slot))
        gc.collect()
    return {
        "steps": steps,
        "ceiling": asdict(ceiling),
        "memory": memory(engine),
        "weights": str(weights),
        "device": str(device),
    }


def memory(engine: Engine) -> dict[str, float]:
    """KV of one session, and of 64 samples of its prompt of 1,000 tokens, in slots."""
    prompt = [i % 1000 for i in range(1000)]
    engine.run(Job([Row("one", 0, prompt)]))
    one = engine.cache.used
    names = [f"n{i}" for i in range(63)]
    for name in names:
        engine.run(Job([Row(name, 0, prompt)]))
    many = engine.cache.used
    for name in ["one", *names]:
        engine.cache.close(name)
    return {
        "bytes_per_token": engine.pool.bytes_per_slot,
        "shared_prefix_memory_ratio_n64": many / one,
    }


def full_depth(model: str, folder: Path) -> Path:
    """Write the whole backbone under a random head as a checkpoint; returns `folder`."""
    torch.manual_seed(0)
    backbone = load_backbone(model)
    facts = LenvmConfig(
        gamma=0.99,
        base_model=model,
        weights="head",
        num_layers=backbone.config.num_hidden_layers,
        tokenizer_fingerprint="",
    )
    ValueModel(backbone, ValueHead(backbone.config.hidden_size), facts).save(folder)
    return folder


def plot(steps: Sequence[Step], path: Path) -> None:
    """Step time over the prefix, K = 15, a panel for each number of sessions."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SESSIONS), figsize=(11, 3.5), sharey=True)
    names = (*USUAL, "ours", "ceiling")
    for axis, sessions in zip(axes, SESSIONS, strict=True):
        rows = [row for row in steps if (row["sessions"], row["candidates"]) == (sessions, 15)]
        for colour, name in enumerate(names):
            y = [row[name] for row in rows]  # None leaves a gap
            style = "k:" if name == "ceiling" else f"C{colour}o-"
            axis.plot([row["prefix"] for row in rows], np.array(y, dtype=float), style, label=name)
        axis.set(xscale="log", yscale="log", xlabel="prefix, tokens", xticks=PREFIXES)
        axis.set_xticklabels([str(p) for p in PREFIXES])
        axis.minorticks_off()
        axis.set_title(f"{sessions} session{'s' * (sessions > 1)}, 15 candidates each")
    axes[0].set_ylabel("ms per step")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@app.default
def main(
    *,
    model: str,
    checkpoint: Path | None = None,
    threads: int = 1,
    headline: bool = False,
    repeats: int = 5,
    output: Path = Path("runs/scoring"),
) -> None:
    """Measure, print a table, and end with one JSON line.

    Parameters
    ----------
    model
        Hub name or folder of the backbone, measured at full depth under a random head.
    checkpoint
        A value model on that backbone, measured as well.
    threads
        CPU threads.
    headline
        Only 1 and 32 sessions behind 512 tokens with 15 candidates.
    repeats
        Runs of each shape; the shortest counts.
    output
        Folder of the plot and of all figures as JSON.
    """
    logging.set_verbosity_error()
    settings = ServerSettings(base_model=model, threads=threads, slots=1 << 17)
    shapes = [HEADLINE, HEADLINE_OF_MANY] if headline else ALL
    output.mkdir(parents=True, exist_ok=True)
    everything: dict[str, Any] = {"threads": threads}
    everything["http_overhead_ms"] = overhead_ms()  # while this process is still small
    checkpoints = {"full depth": full_depth(model, output / "full-depth")}
    if checkpoint is not None:
        checkpoints["checkpoint"] = checkpoint
    for name, folder in checkpoints.items():
        found = everything[name] = measure(folder, settings, shapes, repeats)
        if not headline:
            plot(found["steps"], output / f"{name.replace(' ', '-')}.png")
        rows = [{n: whole_above_100(value) for n, value in row.items()} for row in found["steps"]]
        print(f"\n## {name}: {found['weights']}, {threads} thread(s), {found['device']}\n")
        print(table(rows), end="\n\n")
        gc.collect()
    (output / "scoring.json").write_text(json.dumps(everything, indent=1) + "\n")
    end(summary(everything))


def whole_above_100(number: float | None) -> float | None:
    """For a table."""
    return number if number is None or number < 100 else round(number)


def summary(everything: dict[str, Any]) -> dict[str, Any]:
    """The last line."""
    full = everything["full depth"]
    rows = {(r["sessions"], r["prefix"], r["candidates"]): r for r in full["steps"]}
    head, many = rows[HEADLINE], rows[HEADLINE_OF_MANY]
    return {
        **{f"speedup_vs_{n}": round(head[n] / head["ours"], 2) for n in USUAL},
        "ceiling_fraction_b1": round(head["ceiling"] / head["ours"], 3),
        "ceiling_fraction_b32": round(many["ceiling"] / many["ours"], 3),
        "http_overhead_ms_p50": round(everything["http_overhead_ms"]["tcp"], 2),
        "shared_prefix_memory_ratio_n64": full["memory"]["shared_prefix_memory_ratio_n64"],
        "step_ms_b1": round(head["ours"], 1),
        "step_ms_b32": round(many["ours"], 1),
        "weights": full["weights"],
    }


if __name__ == "__main__":
    app()
