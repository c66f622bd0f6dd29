"""Which tokens lengthen or shorten a text, with intervals (paper, Figure 4)?

The farthest of many scores are far by chance, too. So the tokens are chosen on one half of the
prompts, and told with the score that they have on the other.
"""

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.estimates import LEVEL, Estimate
from trainer.evaluation.figures import Predicted
from trainer.evaluation.tokens import TokenScore, ends_of, quoted, token_scores

WIDTH = NormalDist().inv_cdf(0.5 + LEVEL / 200)  # standard errors on each side
Rows = list[dict[str, Any]]


def length_tokens(
    texts: Sequence[Predicted],
    gamma: float,
    tokenizer: PreTrainedTokenizerBase,
    min_count: int = 20,
    min_prompts: int = 10,
    top: int = 12,
) -> dict[str, Rows]:
    """`lengthen` and `shorten`, up to `top` tokens each, the farthest of the first half first.

    A token needs `min_count` occurrences in texts of `min_prompts` prompts, at least 2, in each
    half. `chosen_by`: its score in the first.
    """
    chosen, judged = (
        [s for s in token_scores(half, gamma, min_count) if s.prompts >= min_prompts]
        for half in halves(texts)
    )
    scores = {s.id: s for s in judged}
    ends = ends_of([s for s in chosen if s.id in scores], top, tokenizer)
    return {
        end: [
            {"id": s.id, "text": s.text, "score": _estimate(scores[s.id]), "chosen_by": s.score}
            for s in found
        ]
        for end, found in ends.items()
    }


def halves(texts: Sequence[Predicted]) -> tuple[list[Predicted], list[Predicted]]:
    """Every second prompt, by name, with all its texts."""
    names = sorted({text.rollout.prompt_id for text in texts})
    first = {*names[::2]}
    parts: tuple[list[Predicted], list[Predicted]] = ([], [])
    for text in texts:
        parts[text.rollout.prompt_id not in first].append(text)
    return parts


def _estimate(found: TokenScore) -> Estimate:
    width = WIDTH * (found.error or 0.0)
    low, high = found.score - width, found.score + width
    return Estimate(found.score, low, high, found.count, found.prompts)


def table_rows(tokens: Mapping[str, Rows]) -> Rows:
    """Scores in thousandths of u."""
    return [
        {"end": end, "token": quoted(row["text"]), "score / 0.001": row["score"].scaled(1000)}
        | {"n": row["score"].n, "prompts": row["score"].groups}
        | {"in the half it was chosen by": row["chosen_by"] * 1000}
        for end, rows in tokens.items()
        for row in rows
    ]
