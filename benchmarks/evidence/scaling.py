"""What makes a better value model: depth, prompts, or samples of each prompt? (paper, §4.3)

    python -m benchmarks.evidence.scaling --rollouts rollouts/ --model MODEL

Each axis is varied alone, from the full data and the deepest backbone downwards. All runs have
the same recipe, gamma and held-out prompts. A run that is done is not done again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from cyclopts import App, Parameter

from benchmarks.evidence.grid import Run, grid_rows, run_grid
from benchmarks.evidence.small import SmallLora, SmallRecipe
from benchmarks.rows import keep_settings
from benchmarks.tables import table
from trainer.checks import check
from trainer.data import read_rollouts, split
from trainer.training.objective import Objective
from trainer.training.train import Tune, choose_gamma, load_shape

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
    rollouts: Path,
    output: Path,
    depths: Sequence[int],
    shares: Sequence[float],
    samples: Sequence[int],
    models: Sequence[str],
) -> list[Run]:
    """One run for each setting of each axis."""
    data = output / "data"
    deepest = {"num_layers": max(depths)} if depths else {}
    runs = [
        Run(axis="layers", setting=str(n), rollouts=rollouts, options={"num_layers": n})
        for n in depths
    ]
    for share in shares:
        part = subset(rollouts, share, None, data / f"prompts-{share:g}.parquet")
        setting = f"{share:.0%}"
        runs.append(Run(axis="prompts", setting=setting, rollouts=part, options=deepest))
    for count in samples:
        part = subset(rollouts, 1.0, count, data / f"samples-{count}.parquet")
        runs.append(Run(axis="samples", setting=str(count), rollouts=part, options=deepest))
    runs += [
        Run(axis="model", setting=Path(m).name, rollouts=rollouts, options={"model": m})
        for m in models
    ]
    return runs


@app.default
def main(
    *,
    rollouts: Path,
    model: str,
    depths: tuple[int, ...] = (2, 4, 8, 16),
    shares: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0),
    samples: tuple[int, ...] = (1, 2),
    models: tuple[str, ...] = (),
    tune: Tune = "lora",
    lora: SmallLora = SmallLora(),
    objective: Objective = Objective(),
    recipe: SmallRecipe = SmallRecipe(),
    holdout: float = 0.1,
    output: Path = Path("runs/scaling"),
    only_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Train, evaluate, print a table and, as the last line, one JSON object.

    Parameters
    ----------
    rollouts
        Parquet file or folder of shards, several completions a prompt.
    model
        Hub name or folder of the backbone.
    depths
        Layers of the backbone; data are varied on the deepest.
    shares
        Of the prompts.
    samples
        Of each prompt.
    models
        Other backbones of the same tokenizer, each at full depth.
    tune, lora, objective, recipe, holdout
        As for `lenvm train`.
    output
        Folder of the checkpoints and figures.
    only_json
        Print nothing else.
    """
    depth, _ = load_shape(model)
    check(all(1 <= n <= depth for n in depths), "depths", depths, f"within 1 to {depth}")
    check(all(0 < share <= 1 for share in shares), "shares", shares, "above 0, at most 1")
    check(all(n > 0 for n in samples), "samples", samples, "above 0")
    check(0 < holdout < 1, "holdout", holdout, "between 0 and 1")
    known, _ = split(read_rollouts(rollouts), holdout)
    gamma = choose_gamma(known, objective, rollouts)
    objective = replace(objective, gamma=gamma, gamma_percentile=None)
    base: dict[str, Any] = {"model": model, "tune": tune, "lora": lora, "objective": objective}
    base |= {"recipe": recipe, "holdout": holdout}
    names = {"model": Path(model).name, "rollouts": rollouts.name}
    keep_settings(output, {name: repr(value) for name, value in base.items()} | names)
    runs = runs_of(rollouts, output, depths, shares, samples, models)
    rows = run_grid(runs, rollouts, output, gamma, base)
    line = json.dumps({"gamma": gamma, "runs": rows})
    (output / "figures.json").write_text(line + "\n")
    if not only_json:
        print(table(grid_rows(rows)))
    print(line)


if __name__ == "__main__":
    app()
