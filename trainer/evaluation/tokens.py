"""`lenvm tokens`: which tokens lengthen a text and which shorten it (paper, §3.6).

The score of a token is by how much it changed the length to come, beyond the one token that it
is: gamma·u_t - u_{t-1} + (1 - gamma), the temporal difference of u; above 0 it lengthens. The
end-of-sequence token has none: it ends.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
from cyclopts import Parameter
from numpy.typing import NDArray
from transformers import AutoTokenizer

from trainer.checks import check, check_choice
from trainer.data import Rollout, read_rollouts
from trainer.evaluation.journal import Journal
from trainer.evaluation.predict import Precision, load_model, predict_all
from trainer.plots import check_picture, plot_clouds


@dataclass(frozen=True, slots=True)
class TokenScore:
    """score: mean over `count` occurrences; error: standard error of that mean."""

    id: int
    text: str
    count: int
    score: float
    error: float


def tokens(
    checkpoint: Path,
    rollouts: Path,
    *,
    base_model: str | None = None,
    limit: int | None = None,
    min_count: int = 20,
    top: int = 20,
    max_length: int = 3000,
    dtype: Precision = "auto",
    cloud: Path | None = None,
    only_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> dict[str, Any]:
    """Score the tokens of ROLLOUTS that lengthen or shorten a text, by CHECKPOINT.

    Prints a table and, as its last line, one JSON object.

    Parameters
    ----------
    checkpoint
        Folder that `lenvm train` wrote.
    rollouts
        Parquet file or folder of shards.
    base_model
        Where backbone and tokenizer lie, if not where the checkpoint says.
    limit
        Use only the first so many completions.
    min_count
        Occurrences that a token needs.
    top
        Tokens at each end of the table.
    max_length
        Tokens of a text that are looked at.
    dtype
        Of the backbone; auto is that of `lenvm serve`: bfloat16 where the device has it.
    cloud
        Picture of two word clouds to write, as .png, .svg or .pdf; needs `wordcloud`.
    only_json
        Print nothing else.
    """
    for name, value in (("min_count", min_count), ("top", top)):
        check(value > 0, name, value, "above 0")
    check(limit is None or limit > 0, "limit", limit, "above 0")
    check_choice("dtype", dtype, get_args(Precision))
    check_picture("cloud", cloud)
    model = load_model(checkpoint, base_model, dtype)
    tokenizer = AutoTokenizer.from_pretrained(base_model or model.lenvm.base_model)
    texts = read_rollouts(rollouts)[:limit]
    journal = Journal.of(checkpoint, model, texts, max_length)
    values = predict_all(model, texts, max_length, checkpoint.name, only_json, journal)
    scored = token_scores(texts, values, model.lenvm.gamma, min_count)
    check(bool(scored), "min_count", min_count, f"at most what {rollouts} has of any token")
    named = [
        TokenScore(i, tokenizer.decode([i]), count, score, error)
        for i, count, score, error in scored
    ]
    # A token is at one end only, also where there are few.
    ends = {
        "lengthen": [s for s in named[:top] if s.score > 0],
        "shorten": [s for s in named[::-1][:top] if s.score < 0],
    }
    if cloud:
        clouds = {
            end: {s.text: abs(s.score) for s in rows if s.text.strip()}
            for end, rows in ends.items()
        }
        plot_clouds(clouds, cloud)
    if not only_json:
        print(score_table(ends))
    result = {end: [asdict(s) for s in rows] for end, rows in ends.items()}
    print(json.dumps(result))
    journal.remove()
    return result


def step_scores(z: NDArray[np.floating[Any]], gamma: float) -> NDArray[np.float64]:
    """(T - 1,) of all tokens but the first, from (T,) logits."""
    u = 1 / (1 + np.exp(-z.astype(np.float64)))
    return gamma * u[1:] - u[:-1] + (1 - gamma)


def token_scores(
    rollouts: Sequence[Rollout],
    logits: Sequence[NDArray[np.floating[Any]]],
    gamma: float,
    min_count: int,
) -> list[tuple[int, int, float, float]]:
    """(id, count, mean score, standard error), highest first."""
    ids, scores = [], []
    for rollout, z in zip(rollouts, logits, strict=True):
        start = len(rollout.prompt_ids) - 1
        own = rollout.completion_ids[: len(rollout.completion_ids) - rollout.finished]
        own_scores = step_scores(z[start:], gamma)[: len(own)]
        scores.append(own_scores)
        ids.append(own[: len(own_scores)])
    all_ids, all_scores = np.concatenate(ids), np.concatenate(scores)
    unique, place, counts = np.unique(all_ids, return_inverse=True, return_counts=True)
    means = np.bincount(place, all_scores) / counts
    variances = np.bincount(place, np.square(all_scores - means[place])) / counts
    errors = np.sqrt(variances / counts)
    order = [int(k) for k in np.argsort(-means, kind="stable") if counts[k] >= min_count]
    return [(int(unique[k]), int(counts[k]), float(means[k]), float(errors[k])) for k in order]


def score_table(ends: dict[str, list[TokenScore]]) -> str:
    """Markdown: token, occurrences, score in thousandths of u with its standard error."""
    lines = ["| | token | count | score / 0.001 |", "|---|---|---:|---:|"]
    for end, rows in ends.items():
        for s in rows:
            text = json.dumps(s.text, ensure_ascii=False).replace("|", "\\|")
            lines.append(
                f"| {end} | `{text}` | {s.count} | {s.score * 1e3:+.1f} ± {s.error * 1e3:.1f} |"
            )
    return "\n".join(lines)
