"""What does a step cost? Our engine against the usual ways to score candidates.

    python -m benchmarks.systems.scoring --model MODEL [--checkpoint CHECKPOINT]

A step: each session emits one of its candidates and asks for K new ones behind a prefix of P
tokens. Baselines, in plain transformers with sdpa, on the same weights, in the faster of float32
and the engine's own type:

    reforward   the whole text again for each candidate (one candidate measured, times K, but for
                the headline shape: there all of them)
    copy        one copy of the prefix's keys and values per candidate, one token behind each
    tree        the candidates as one row behind the prefix, under a mask; cache cropped after it

Ceiling: the larger of weight bytes over read bandwidth and FLOPs over the rate of matrix
products, both measured in this run. All baselines hold equal prefixes, which suits them.
"""

import gc
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import App, Parameter
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache
from transformers.utils import logging

from benchmarks.systems.http_overhead import overhead_ms
from value_server.contract.checkpoint import LenvmConfig
from value_server.engine.engine import Engine
from value_server.engine.job import Job, Row
from value_server.engine.linear import compute_dtype, weight_dtype
from value_server.engine.memory import keep_freed_memory
from value_server.model.value_model import ValueHead, ValueModel, load_backbone

app = App(help=__doc__)
SESSIONS, PREFIXES, CANDIDATES = (1, 8, 32), (128, 512, 2048), (5, 15)
HEADLINE = (1, 512, 15)
BASELINE_BYTES = 6 << 30  # keys and values that a baseline may hold, else it is left out


@dataclass(frozen=True)
class Ceiling:
    """weight_bytes, flops_per_token: of the linear layers."""

    weight_bytes: int
    flops_per_token: float
    bytes_per_s: float
    flops_per_s: float

    def seconds(self, tokens: int) -> float:
        return max(
            self.weight_bytes / self.bytes_per_s, tokens * self.flops_per_token / self.flops_per_s
        )


@dataclass
class Result:
    """Times in ms, None where a baseline was left out."""

    model: str
    sessions: int
    prefix: int
    candidates: int
    ours: float
    ceiling: float
    reforward: float | None = None
    copy: float | None = None
    tree: float | None = None


def best_ms(run: Callable[[], Any], repeats: int, synchronize: Callable[[], None]) -> float:
    """The shortest of `repeats` runs after one more: the machine's other work only adds."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times[1:])


def measure_ceiling(model: ValueModel, dtype: torch.dtype, sync: Callable[[], None]) -> Ceiling:
    """Read bandwidth from a sum over 400 MB, GEMM rate as the best of the types at 2048³."""
    device = next(model.parameters()).device
    linears = [m for m in model.backbone.modules() if isinstance(m, torch.nn.Linear)]
    parameters = sum(m.weight.numel() for m in linears)
    big = torch.ones(100 << 20, device=device)
    bandwidth = big.numel() * 4 / (best_ms(big.sum, 5, sync) / 1e3)
    del big
    rates = []
    for kind in {torch.float32, torch.bfloat16, compute_dtype(dtype, device)}:
        a = torch.randn(2048, 2048, device=device, dtype=kind)
        rates.append(2 * 2048**3 / (best_ms(lambda a=a: a @ a, 3, sync) / 1e3))  # type: ignore[misc]
    return Ceiling(parameters * dtype.itemsize, 2.0 * parameters, bandwidth, max(rates))


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


class Baselines:
    """The usual ways, on a plain model. All sessions have the same length: no padding."""

    def __init__(self, model: ValueModel, sessions: int, prefix: int, candidates: int) -> None:
        self.model, self.sessions, self.candidates = model, sessions, candidates
        self.device = next(model.parameters()).device
        vocabulary = model.config.vocab_size
        self.prompt = torch.randint(vocabulary, (sessions, prefix), device=self.device)
        self.ids = torch.arange(1000, 1000 + candidates, device=self.device)

    def reforward(self, rows: int) -> None:
        """`rows` texts, one at a time."""
        text = torch.cat([self.prompt[:1], self.ids[:1, None]], dim=1)
        for _ in range(rows):
            self.model(text)

    def prefix_cache(self) -> DynamicCache:
        """Random keys and values: what they are does not change the time."""
        config = self.model.config
        heads = config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (self.sessions, heads, self.prompt.shape[1], size)
        dtype = next(self.model.backbone.parameters()).dtype
        cache = DynamicCache(config=config)
        for index in range(config.num_hidden_layers):
            keys, values = torch.randn(2, *shape, device=self.device).to(dtype)
            cache.update(keys, values, index)
        return cache

    def copy(self, cache: DynamicCache) -> Tensor:
        copies = DynamicCache(config=self.model.config)
        for index, layer in enumerate(cache.layers):
            copies.update(layer.keys, layer.values, index)
        copies.batch_repeat_interleave(self.candidates)
        ids = self.ids.repeat(self.sessions)[:, None]  # (B * K, 1)
        output = self.model.backbone(ids, past_key_values=copies, use_cache=True)
        z: Tensor = self.model.head(output.last_hidden_state)
        return z

    def tree(self, cache: DynamicCache) -> Tensor:
        length, count = self.prompt.shape[1], self.candidates
        mask = torch.ones(count, length + count, dtype=torch.bool, device=self.device)
        mask[:, length:] = torch.eye(count, dtype=torch.bool, device=self.device)
        output = self.model.backbone(
            self.ids.repeat(self.sessions, 1),
            position_ids=torch.full((self.sessions, count), length, device=self.device),
            attention_mask=mask[None, None].expand(self.sessions, 1, -1, -1),
            past_key_values=cache,
            use_cache=True,
        )
        z: Tensor = self.model.head(output.last_hidden_state)
        cache.crop(length)
        return z


@torch.inference_mode()
def measure(
    name: str,
    load: Callable[[], ValueModel],
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int, int]],
    repeats: int,
    compiled: bool,
) -> tuple[list[Result], Ceiling, dict[str, float]]:
    """All shapes (B, P, K) of one model. `load` gives it afresh, on its device, ready to run."""
    plain = load()
    device = next(plain.parameters()).device

    def sync() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    ceiling = measure_ceiling(plain, dtype, sync)
    engine = Engine(
        load(), slots=1 << 17, weight_dtype=dtype, prefill_tokens=512, compiled=compiled
    )
    engine.warm_up()
    results = []
    for b, p, k in tqdm(shapes, desc=name):
        ours = Ours(engine, b, p, k)
        result = Result(
            name, b, p, k, best_ms(ours.step, repeats, sync), 1e3 * ceiling.seconds(b * k)
        )
        ours.close()
        base = Baselines(plain, b, p, k)
        per_token = engine.pool.bytes_per_slot
        if (b, p, k) == HEADLINE:
            result.reforward = best_ms(lambda base=base, k=k: base.reforward(k), 1, sync)  # type: ignore[misc]
        elif b == 1:
            result.reforward = k * best_ms(lambda base=base: base.reforward(1), 1, sync)  # type: ignore[misc]
        if b * p * per_token <= BASELINE_BYTES:
            cache = base.prefix_cache()
            result.tree = best_ms(lambda base=base, c=cache: base.tree(c), repeats, sync)  # type: ignore[misc]
            if b * p * k * per_token <= BASELINE_BYTES:
                result.copy = best_ms(lambda base=base, c=cache: base.copy(c), repeats, sync)  # type: ignore[misc]
            del cache
        gc.collect()
        results.append(result)
    return results, ceiling, memory(engine)


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


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    names = [n for n in asdict(results[0]) if n != "model"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---:|" * len(names)]
    for result in results:
        cells = [getattr(result, n) for n in names]
        lines.append(
            "| "
            + " | ".join(
                "" if c is None else f"{c:.1f}" if isinstance(c, float) else str(c) for c in cells
            )
            + " |"
        )
    return "\n".join(lines)


def plot(results: Sequence[Result], path: Path) -> None:
    """Step time over the prefix, K = 15, a panel for each number of sessions."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SESSIONS), figsize=(11, 3.5), sharey=True)
    names = ("reforward", "copy", "tree", "ours", "ceiling")
    for axis, sessions in zip(axes, SESSIONS, strict=True):
        rows = [r for r in results if r.sessions == sessions and r.candidates == 15]
        for colour, name in enumerate(names):
            y = [getattr(r, name) for r in rows]  # None leaves a gap
            style = "k:" if name == "ceiling" else f"C{colour}o-"
            axis.plot([r.prefix for r in rows], np.array(y, dtype=float), style, label=name)
        axis.set(xscale="log", yscale="log", xlabel="prefix, tokens", xticks=PREFIXES)
        axis.set_xticklabels([str(p) for p in PREFIXES])
        axis.minorticks_off()
        axis.set_title(f"{sessions} session{'s' * (sessions > 1)}, 15 candidates each")
    axes[0].set_ylabel("ms per step")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@app.default
def scoring(
    *,
    model: str,
    checkpoint: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int = 1,
    compiled: Annotated[bool, Parameter(name="--compile")] = False,
    headline: bool = False,
    repeats: int = 5,
    output: Path = Path("runs/scoring"),
    only_json: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Measure, print a table, and end with one JSON line.

    Parameters
    ----------
    model
        Hub name or folder of the backbone, measured at full depth under a random head.
    checkpoint
        A value model on that backbone, measured as well.
    device
        cpu, cuda, or auto.
    dtype
        Of the engine's weights, as for `lenvm serve`.
    threads
        CPU threads.
    compiled
        As for `lenvm serve`.
    headline
        Only 1 and 32 sessions behind 512 tokens with 15 candidates.
    repeats
        Runs of each shape; the shortest counts.
    output
        Folder of the plot and of all figures as JSON.
    only_json
        No tables.
    """
    logging.set_verbosity_error()
    keep_freed_memory()  # the baselines gain from it as well
    torch.set_num_threads(threads)
    where = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    )
    weights = weight_dtype(dtype, where)
    compute = compute_dtype(weights, where)

    def full_depth() -> ValueModel:
        torch.manual_seed(0)
        backbone = load_backbone(model, None, compute)
        facts = LenvmConfig(
            gamma=0.99,
            base_model=model,
            weights="head",
            num_layers=backbone.config.num_hidden_layers,
            tokenizer_fingerprint="",
        )
        head = ValueHead(backbone.config.hidden_size)
        return ValueModel(backbone, head, facts).eval().to(where)

    loaders: dict[str, Callable[[], ValueModel]] = {"full depth": full_depth}
    if checkpoint is not None:
        loaders["checkpoint"] = lambda: ValueModel.load(checkpoint, model, compute).to(where)
    shapes = [(b, p, k) for b in SESSIONS for p in PREFIXES for k in CANDIDATES]
    if headline:
        shapes = [HEADLINE, (32, *HEADLINE[1:])]
    everything: dict[str, Any] = {"threads": threads, "weights": str(weights), "device": str(where)}
    everything["http_overhead_ms"] = overhead_ms(32, 15)  # while this process is still small
    output.mkdir(parents=True, exist_ok=True)
    for name, load in loaders.items():
        results, ceiling, sizes = measure(name, load, weights, shapes, repeats, compiled)
        everything[name] = {
            "steps": [asdict(r) for r in results],
            "ceiling": asdict(ceiling),
            "memory": sizes,
        }
        if not headline:
            plot(results, output / f"{name.replace(' ', '-')}.png")
        if not only_json:
            print(f"\n## {name}: {weights}, {threads} thread(s), {where}\n\n{table(results)}\n")
        gc.collect()
    (output / "scoring.json").write_text(json.dumps(everything, indent=1) + "\n")
    print(json.dumps(summary(everything)))


def summary(everything: dict[str, Any]) -> dict[str, Any]:
    """The last line."""
    full = everything["full depth"]
    rows = {(r["sessions"], r["prefix"], r["candidates"]): r for r in full["steps"]}
    head, many = rows[HEADLINE], rows[(32, *HEADLINE[1:])]
    return {
        **{
            f"speedup_vs_{n}": round(head[n] / head["ours"], 2)
            for n in ("reforward", "copy", "tree")
        },
        "ceiling_fraction_b1": round(head["ceiling"] / head["ours"], 3),
        "ceiling_fraction_b32": round(many["ceiling"] / many["ours"], 3),
        "http_overhead_ms_p50": round(everything["http_overhead_ms"]["tcp"], 2),
        "shared_prefix_memory_ratio_n64": full["memory"]["shared_prefix_memory_ratio_n64"],
        "step_ms_b1": round(head["ours"], 1),
        "step_ms_b32": round(many["ours"], 1),
        "weights": everything["weights"],
    }


if __name__ == "__main__":
    app()
