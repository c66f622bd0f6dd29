"""`lenvm tokens`: which tokens lengthen a text and which shorten it (paper, §3.6).

The score of a token is by how much it changed the length to come, beyond the one token that it
is: gamma·u_t - u_{t-1} + (1 - gamma), the temporal difference of u; above 0 it lengthens. The
end-of-sequence token has none: it ends. Occurrences in the texts of one prompt are not independent,
so the error of a mean is that of prompts drawn with all of theirs.
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
from trainer.data import THINKING_END, ending_at, split
from trainer.evaluation.figures import Predicted, predicted
from trainer.evaluation.journal import close_journal, open_journal
from trainer.evaluation.predict import predict_all
from trainer.output import show, table
from trainer.plots import check_picture, plot_clouds
from trainer.reading import Reading
from trainer.rollout_files import TokenizerOf, read_rollouts
from value_server.contract.checkpoint import tokenizer_source


@dataclass(frozen=True, slots=True)
class TokenScore:
    """score: mean over `count` occurrences in texts of `prompts` prompts; error: standard error of
    that mean, None of one prompt."""

    id: int
    count: int
    prompts: int
    score: float
    error: float | None
    text: str = ""


def tokens(
    checkpoint: Path,
    rollouts: Path,
    *,
    limit: int | None = None,
    holdout: float | None = None,
    min_count: int = 20,
    min_prompts: int = 1,
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
    holdout
        Use only the prompts that a training with this share held out; by default all.
    min_count
        Occurrences that a token needs.
    min_prompts
        Prompts that it needs to occur in texts of; a standard error of few is a rough one.
    top
        Tokens at each end of the table.
    cloud
        Picture of two word clouds to write, as .png, .svg or .pdf; needs `wordcloud`.
    """
    check_positive(min_count=min_count, min_prompts=min_prompts, top=top, limit=limit)
    check(holdout is None or 0 < holdout <= 1, "holdout", holdout, "above 0 and at most 1")
    reading.check()
    check_picture("cloud", cloud)
    model = reading.load(checkpoint)
    base_model = reading.base_model or model.lenvm.base_model
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(checkpoint, base_model))
    learnt = TokenizerOf(str(checkpoint), model.lenvm.tokenizer_fingerprint)
    end = model.lenvm.training.get(THINKING_END)
    _, texts = split(ending_at(read_rollouts(rollouts, learnt), end), holdout or 1.0)
    texts = texts[:limit]
    journal = open_journal(checkpoint, model, texts, reading.max_length)
    values = predict_all(model, texts, reading, checkpoint.name, journal)
    gamma = model.lenvm.gamma
    known = predicted(texts, values, gamma, reading.max_length)
    scored = token_scores(known, gamma, min_count)
    check(bool(scored), "min_count", min_count, f"at most what {rollouts} has of any token")
    scored = [s for s in scored if s.prompts >= min_prompts]
    check(bool(scored), "min_prompts", min_prompts, f"at most those of any token in {rollouts}")
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


def token_scores(texts: Sequence[Predicted], gamma: float, min_count: int) -> list[TokenScore]:
    """Of tokens that occur at least `min_count` times, highest first; without their text."""
    if not texts:
        return []
    names, places = np.unique([t.rollout.prompt_id for t in texts], return_inverse=True)
    prompts = np.repeat(places, [len(t.z) - 1 for t in texts])
    ids = np.concatenate([t.rollout.completion_ids[: len(t.z) - 1] for t in texts])
    scores = np.concatenate([step_scores(t.z, gamma) for t in texts])
    unique, token, counts = np.unique(ids, return_inverse=True, return_counts=True)
    means = np.bincount(token, scores) / counts
    pairs, pair = np.unique(token * len(names) + prompts, return_inverse=True)
    of_pair = pairs // len(names)  # which token each (token, prompt) is of
    groups = np.bincount(of_pair)
    squares = np.bincount(of_pair, np.square(np.bincount(pair, scores - means[token])))
    errors = np.sqrt(squares * groups / np.maximum(groups - 1, 1)) / counts
    return [
        TokenScore(
            int(unique[k]),
            int(counts[k]),
            int(groups[k]),
            float(means[k]),
            float(errors[k]) if groups[k] > 1 else None,
        )
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
    """Markdown: token, occurrences, prompts, score in thousandths of u with its standard error."""
    return table(
        [
            {"end": end, "token": quoted(s.text), "count": s.count, "prompts": s.prompts}
            | {"score / 0.001": f"{s.score * 1e3:+.1f}{_plus_minus(s.error)}"}
            for end, rows in ends.items()
            for s in rows
        ]
    )


def quoted(text: str) -> str:
    """A token's text for a table, its spaces visible."""
    return f"`{json.dumps(text, ensure_ascii=False)}`"


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error * 1e3:.1f}"
