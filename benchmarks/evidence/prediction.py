"""How well do value models predict, before the first token and at every token?

    python -m benchmarks.evidence.prediction --rollouts rollouts/ --checkpoint A --checkpoint B

On prompts that training did not see: MRE at the prompt's end by domain (paper, Eq. 13 to 15),
squared error and R² of u at every token of the finished completions, as `lenvm evaluate` has
them, here with intervals. All checkpoints are compared under the gamma of the first.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
from cyclopts import App, Parameter
from numpy.typing import NDArray

from benchmarks.estimates import Estimate, Sample, estimate
from benchmarks.tables import table
from trainer.checks import check, check_choice
from trainer.data import Rollout, read_rollouts
from trainer.evaluation.baselines import baseline_logits
from trainer.evaluation.evaluate import split_as_trained, with_gamma
from trainer.evaluation.figures import known_places, relative_error
from trainer.evaluation.predict import Precision, load_model, predict_all

app = App(help=__doc__)
Figures = dict[str, Estimate]


def figures_of(
    rollouts: Sequence[Rollout],
    logits: Sequence[NDArray[np.floating[Any]]],
    gamma: float,
    max_length: int,
) -> Figures:
    """`mre DOMAIN`, `loss` (mean squared error of u) and `r2` of logits, (T,) each."""
    boundary: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    truth: list[NDArray[np.float64]] = []
    errors: list[NDArray[np.float64]] = []
    groups: list[str] = []
    for rollout, z in zip(rollouts, logits, strict=True):
        u, own = known_places(rollout, z, gamma, max_length)
        if not len(u):
            continue
        predicted = 1 / (1 + np.exp(-own))
        boundary[rollout.domain, rollout.prompt_id].append((float(u[0]), float(predicted[0])))
        if rollout.finished:
            truth.append(u)
            errors.append(np.square(predicted - u))
            groups += [rollout.prompt_id] * len(u)
    figures = {}
    for domain in sorted({domain for domain, _ in boundary}):
        own_errors = {p: relative_error(pairs) for (d, p), pairs in boundary.items() if d == domain}
        figures[f"mre {domain}"] = estimate(Sample([*own_errors.values()], [*own_errors]))
    squared, values = np.concatenate(errors), np.concatenate(truth)
    spread = Sample(list(np.square(values - values.mean())), groups)
    figures["loss"] = estimate(Sample(list(squared), groups))
    figures["r2"] = estimate(Sample(list(squared), groups), spread, of=lambda e, s: 1 - e / s)
    return figures


def predict_held_out(
    checkpoint: Path,
    rollouts: Sequence[Rollout],
    *,
    base_model: str | None = None,
    gamma: float | None = None,
    holdout: float | None = None,
    max_length: int = 3000,
    dtype: Precision = "auto",
    quiet: bool = False,
) -> dict[str, Figures]:
    """Figures of a checkpoint and of its baselines, on the prompts that it did not see.

    gamma: to compare under, by default the checkpoint's own.
    """
    model = load_model(checkpoint, base_model, dtype)
    own = model.lenvm.gamma
    gamma = gamma or own
    _, held_out = split_as_trained(rollouts, model.lenvm, holdout)
    check(any(r.finished for r in held_out), "holdout", holdout, "a share with a finished text")
    found: dict[str, list[NDArray[Any]]] = {}
    found[checkpoint.name] = [*predict_all(model, held_out, max_length, checkpoint.name, quiet)]
    for name, coefficients in (model.lenvm.training.get("baselines") or {}).items():
        found[name] = [baseline_logits(coefficients, r, max_length) for r in held_out]
    return {
        name: figures_of(held_out, [with_gamma(z, own, gamma) for z in logits], gamma, max_length)
        for name, logits in found.items()
    }


def model_rows(models: Mapping[str, Figures]) -> list[dict[str, Any]]:
    """A row of a table for each model."""
    return [{"model": name, **figure_cells(figures)} for name, figures in models.items()]


def figure_cells(figures: Figures) -> dict[str, Any]:
    """MRE in percent, the squared error in thousandths; n: held-out prompts, and tokens."""
    mre = {name: e for name, e in figures.items() if name.startswith("mre")}
    return {
        **{f"{name}, %": str(scaled(e, 100)) for name, e in mre.items()},
        **{"loss / 0.001": str(scaled(figures["loss"], 1000)), "R²": str(figures["r2"])},
        **{"prompts": sum(e.n for e in mre.values()), "tokens": figures["loss"].n},
    }


def scaled(e: Estimate, factor: float) -> Estimate:
    return Estimate(e.value * factor, e.low * factor, e.high * factor, e.n)


@app.default
def main(
    *,
    rollouts: Path,
    checkpoint: tuple[Path, ...],
    base_model: str | None = None,
    holdout: float | None = None,
    max_length: int = 3000,
    dtype: Precision = "auto",
    output: Path = Path("runs/prediction"),
    only_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Predict, print a table and, as the last line, one JSON object.

    Parameters
    ----------
    rollouts
        Parquet file or folder of shards, several completions a prompt.
    checkpoint
        Folders that `lenvm train` wrote; give it once for each.
    base_model
        Where their backbone lies, if not where they say.
    holdout
        Share of the prompts that was held out, 1 for all; as for `lenvm evaluate`.
    max_length
        Tokens of a text that are looked at.
    dtype
        Of the backbone; auto is that of `lenvm serve`.
    output
        Folder of the figures.
    only_json
        Print nothing else.
    """
    check(max_length > 1, "max_length", max_length, "above 1")
    check_choice("dtype", dtype, get_args(Precision))
    names = [path.name for path in checkpoint]
    check(len({*names}) == len(names), "checkpoint", names, "of different names")
    texts = read_rollouts(rollouts)
    gamma = load_model(checkpoint[0], base_model, dtype).lenvm.gamma
    how: dict[str, Any] = {"base_model": base_model, "holdout": holdout, "dtype": dtype}
    how |= {"gamma": gamma, "max_length": max_length, "quiet": only_json}
    models: dict[str, Figures] = {}
    for path in checkpoint:
        models = predict_held_out(path, texts, **how) | models
    models = {name: models[name] for name in [*names, *(models.keys() - {*names})]}
    result = {
        name: {key: asdict(e) for key, e in figures.items()} for name, figures in models.items()
    }
    output.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"gamma": gamma, "rollouts": rollouts.name, "models": result})
    (output / "figures.json").write_text(line + "\n")
    if not only_json:
        print(table(model_rows(models)))
    print(line)


if __name__ == "__main__":
    app()
