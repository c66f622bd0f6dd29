"""What makes a better value model: depth, prompts, or samples of each prompt? (paper, §4.3)

    python -m benchmarks.evidence.scaling --rollouts rollouts/ --model MODEL

Each axis is varied alone, from the full data and --num-layers. All runs have the same recipe,
gamma and held-out prompts. A run that is done is not done again.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from cyclopts import App

from benchmarks.evidence.grid import Grid, Run
from trainer.checks import check
from trainer.training.backbone import load_shape

app = App(help=__doc__)


def subset(rollouts: Path, share: float, samples: int | None, output: Path) -> Path:
    """A file with that share of the prompts and the first so many samples of each.

    A smaller share is part of a larger one.
    """
    if not output.exists():
        table = pq.read_table(rollouts)
        seen: Counter[str] = Counter()
        keep = []
        for prompt in map(str, table["prompt_id"].to_pylist()):
            digest = hashlib.sha256(f"share/{prompt}".encode()).digest()
            inside = int.from_bytes(digest[:4], "big") < share * 2**32
            keep.append(inside and (samples is None or seen[prompt] < samples))
            seen[prompt] += 1
        output.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.filter(pa.array(keep)), output)
    return output


def runs_of(
    grid: Grid,
    output: Path,
    depths: Sequence[int],
    shares: Sequence[float],
    samples: Sequence[int],
    models: Sequence[str],
) -> Iterator[Run]:
    """One run for each setting of each axis; smaller data are written to `output`."""
    backbone = grid.training.backbone

    def run(axis: str, setting: str, rollouts: Path = grid.rollouts, **changes: Any) -> Run:
        training = replace(grid.training, backbone=replace(backbone, **changes))
        return Run(axis=axis, setting=setting, rollouts=rollouts, training=training)

    for depth in depths:
        yield run("layers", str(depth), num_layers=depth)
    for share in shares:
        part = subset(grid.rollouts, share, None, output / f"prompts-{share:g}.parquet")
        yield run("prompts", f"{share:.0%}", part)
    for count in samples:
        part = subset(grid.rollouts, 1.0, count, output / f"samples-{count}.parquet")
        yield run("samples", str(count), part)
    for model in models:
        yield run("model", Path(model).name, model=model, num_layers=None)


@app.default
def main(
    *,
    grid: Grid,
    depths: tuple[int, ...] = (2, 4, 8, 16),
    shares: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0),
    samples: tuple[int, ...] = (1, 2),
    models: tuple[str, ...] = (),
    output: Path = Path("runs/scaling"),
) -> None:
    """Train, evaluate, print a table and, as the last line, one JSON object.

    Parameters
    ----------
    depths
        Layers of the backbone, in place of num_layers.
    shares
        Of the prompts.
    samples
        Of each prompt.
    models
        Other backbones of the same tokenizer, each at full depth.
    output
        Folder of the checkpoints and figures.
    """
    depth, _ = load_shape(grid.training.backbone.model)
    check(all(1 <= n <= depth for n in depths), "depths", depths, f"within 1 to {depth}")
    check(all(0 < share <= 1 for share in shares), "shares", shares, "above 0, at most 1")
    check(all(n > 0 for n in samples), "samples", samples, "above 0")
    grid.training.check()
    gamma = grid.training.objective.discount(grid.lengths())
    objective = replace(grid.training.objective, gamma=gamma, gamma_percentile=None)
    grid = replace(grid, training=replace(grid.training, objective=objective))
    runs = list(runs_of(grid, output / "data", depths, shares, samples, models))
    grid.run(runs, gamma, output)


if __name__ == "__main__":
    app()
