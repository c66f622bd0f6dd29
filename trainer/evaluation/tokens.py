"""`lenvm tokens`: which tokens lengthen a text and which shorten it (paper, §3.6).

The score of a token is by how much it changed the length to come, beyond the one token that it
is: gamma·u_t - u_{t-1} + (1 - gamma), the temporal difference of u; above 0 it lengthens. The
end-of-sequence token has none: it ends.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trainer.checks import check, check_positive
from trainer.data import THINKING_END, Rollout, ending_at
from trainer.evaluation.journal import close_journal, open_journal
from trainer.evaluation.predict import predict_all
from trainer.output import show, table
from trainer.plots import check_picture, plot_clouds
from trainer.reading import Reading
from trainer.rollout_files import TokenizerOf, read_rollouts


@dataclass(frozen=True, slots=True)
class TokenScore:
    """score: mean over `count` occurrences; error: standard error of that mean."""

    id: int
    count: int
    score: float
    error: float
    text: str = ""


def tokens(
    checkpoint: Path,
    rollouts: Path,
    *,
    limit: int | None = None,
    min_count: int = 20,
    top: int = 20,
    reading: Reading = Reading(),
    cloud: Path | None = None,
) -> dict[str, Any]:
    """Score the tokens of ROLLOUTS that lengthen or shorten a text, by CHECKPOINT.

    Prints a table and, as its last line, one JSON object.

    Parameters
    ----------
    checkpoint
        Folder that `lenvm train` wrote.
    rollouts
        Parquet file or folder of shards.
    limit
        Use only the first so many completions.
    min_count
        Occurrences that a token needs.
    top
        Tokens at each end of the table.
    cloud
        Picture of two word clouds to write, as .png, .svg or .pdf; needs `wordcloud`.
    """
    check_positive(min_count=min_count, top=top, limit=limit)
    reading.check()
    check_picture("cloud", cloud)
    model = reading.load(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(reading.base_model or model.lenvm.base_model)
    learnt = TokenizerOf(str(checkpoint), model.lenvm.tokenizer_fingerprint)
    end = model.lenvm.training.get(THINKING_END)
    texts = ending_at(read_rollouts(rollouts, learnt), end)[:limit]
    journal = open_journal(checkpoint, model, texts, reading.max_length)
    values = predict_all(model, texts, reading, checkpoint.name, journal)
    scored = token_scores(texts, values, model.lenvm.gamma, min_count)
    check(bool(scored), "min_count", min_count, f"at most what {rollouts} has of any token")
    ends = ends_of(scored, top, tokenizer)
    if cloud:
        clouds = {
            end: {s.text: abs(s.score) for s in rows if s.text.strip()}
            for end, rows in ends.items()
        }
        plot_clouds(clouds, cloud)
    result = {end: [asdict(s) for s in rows] for end, rows in ends.items()}
    show(score_table(ends), result, reading.only_json)
    close_journal(journal)
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
) -> list[TokenScore]:
    """Of tokens that occur at least `min_count` times, highest first; without their text."""
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
    return [
        TokenScore(int(unique[k]), int(counts[k]), float(means[k]), float(errors[k]))
        for k in np.argsort(-means, kind="stable")
        if counts[k] >= min_count
    ]


def ends_of(
    scored: Sequence[TokenScore], top: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[TokenScore]]:
    """`top` tokens that lengthen and that shorten, the farthest first; none at both ends."""
    ends = {
        "lengthen": [s for s in scored[:top] if s.score > 0],
        "shorten": [s for s in scored[::-1][:top] if s.score < 0],
    }
    return {
        end: [replace(s, text=tokenizer.decode([s.id])) for s in rows] for end, rows in ends.items()
    }


def score_table(ends: dict[str, list[TokenScore]]) -> str:
    """Markdown: token, occurrences, score in thousandths of u with its standard error."""
    return table(
        [
            {"end": end, "token": f"`{json.dumps(s.text, ensure_ascii=False)}`", "count": s.count}
            | {"score / 0.001": f"{s.score * 1e3:+.1f} ± {s.error * 1e3:.1f}"}
            for end, rows in ends.items()
            for s in rows
        ]
    )
