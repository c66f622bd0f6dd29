"""What does a step cost with lookahead? One row a session, against exact scoring of candidates.

    python -m benchmarks.systems.lookahead CHECKPOINT [--base-model MODEL]

A step of P tokens behind it: with lookahead each session brings one token and is told its query;
exactly scored, it adopts a candidate and asks for K new ones, so that K rows a session are
forwarded (1 + K where the token was none of the candidates). Beside both: one token a session in
plain transformers, over a cache of equally long prefixes.

Two lower bounds. `ceiling` is that of scoring.py, the linear layers' own; `with_attention` adds
one reading of all keys and values. A checkpoint without a lookahead head gets a random one, which
takes as long.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cyclopts import App
from tqdm import tqdm
from transformers.utils import logging

from benchmarks.provenance import end
from benchmarks.systems.baselines import Baselines
from benchmarks.systems.scoring import Ceiling, Ours, measure_ceiling, whole_above_100
from benchmarks.systems.timing import best_ms
from trainer.output import table
from value_server.engine.engine import Engine
from value_server.engine.job import Job, Row
from value_server.engine.linear import compute_dtype, weight_dtype
from value_server.engine.memory import keep_freed_memory
from value_server.model.lookahead import Lookahead
from value_server.model.value_model import ValueModel

app = App(help=__doc__)
HEADLINE = 512  # tokens behind a step, for the last line
Step = dict[str, Any]  # times in ms


class Looking(Ours):
    """Sessions that step with lookahead."""

    def step(self) -> None:
        token = [self.length % 1000]  # none of the candidates
        rank = self.engine.lookahead_rank
        self.engine.run(Job([Row(n, self.length, token, (), rank) for n in self.names]))
        self.length += 1


def load(checkpoint: Path, base_model: str | None, rank: int, slots: int) -> tuple[Engine, Ceiling]:
    """As `lenvm serve` does, with a lookahead head in any case, and the bounds of its steps."""
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = weight_dtype("auto", device)
    compute = compute_dtype(weights, device)
    model = ValueModel.load(checkpoint, base_model, compute)
    if getattr(model, "lookahead", None) is None:
        model.lookahead = Lookahead(model.config.hidden_size, rank)
    ceiling = measure_ceiling(model.to(device), weights, compute)
    engine = Engine(model, slots=slots, weight_dtype=weights)
    engine.warm_up()
    return engine, ceiling


def measure(
    engine: Engine, ceiling: Ceiling, plain: ValueModel, shape: tuple[int, int, int], repeats: int
) -> Step:
    """A step of B sessions behind P tokens, with K candidates where it is scored exactly."""
    sessions, prefix, candidates = shape
    times: Step = {"sessions": sessions, "prefix": prefix}
    for name, kind, count in (("lookahead", Looking, 1), ("exact", Ours, candidates)):
        steps = kind(engine, sessions, prefix, count)
        times[name] = best_ms(steps.step, repeats)
        steps.close()
        engine.cache.forget_kept()
    decode = Baselines(plain, sessions, prefix, 1)
    cache = decode.prefix_cache()
    times["decode"] = best_ms(lambda: decode.tree(cache), repeats)
    times["ceiling"] = ceiling.ms(sessions)
    held = sessions * prefix * engine.pool.bytes_per_slot
    times["with_attention"] = times["ceiling"] + 1e3 * held / ceiling.bytes_per_s
    times["to_exact"] = times["lookahead"] / times["exact"]
    times["of_ceiling"] = times["ceiling"] / times["lookahead"]
    times["of_with_attention"] = times["with_attention"] / times["lookahead"]
    return times


@app.default
@torch.inference_mode()
def main(
    checkpoint: Path,
    *,
    base_model: str | None = None,
    sessions: Sequence[int] = (1, 8, 32, 128),
    prefixes: Sequence[int] = (128, 512, 2048),
    candidates: int = 8,
    rank: int = 128,
    threads: int = 1,
    repeats: int = 9,
) -> None:
    """Measure, print a table, and end with one JSON line.

    Parameters
    ----------
    checkpoint
        Folder of a value model.
    base_model
        Hub name or folder of its backbone, in place of the one that it names.
    sessions
        Of a step.
    prefixes
        Tokens of each session's text.
    candidates
        Of each session, where it is scored exactly.
    rank
        Of the random head of a checkpoint that has none.
    threads
        CPU threads.
    repeats
        Runs of each shape; the shortest counts.
    """
    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    largest = max(sessions) * (max(prefixes) + candidates + 2 * repeats + 64)
    engine, ceiling = load(checkpoint, base_model, rank, largest)
    dtype = next(engine.model.backbone.parameters()).dtype
    plain = ValueModel.load(checkpoint, base_model, dtype).to(engine.device)
    shapes = [(b, p, candidates) for p in prefixes for b in sessions]
    steps = [measure(engine, ceiling, plain, shape, repeats) for shape in tqdm(shapes)]
    rows = [{name: whole_above_100(value) for name, value in step.items()} for step in steps]
    print(f"\n{dtype}, {threads} thread(s), {engine.device}, ms\n\n{table(rows)}\n")
    end(summary(steps))


def summary(steps: Sequence[Step]) -> dict[str, float]:
    """The last line: steps of HEADLINE tokens, or of as many as there are."""
    prefix = HEADLINE if any(s["prefix"] == HEADLINE for s in steps) else steps[0]["prefix"]
    found = {"prefix": prefix}
    for step in steps:
        if step["prefix"] == prefix:
            for name in ("lookahead", "to_exact", "of_ceiling", "of_with_attention"):
                found[f"{name}_b{step['sessions']}"] = round(step[name], 3)
    return found


if __name__ == "__main__":
    app()
