"""How long completions are: what to choose max_tokens, gamma and the treatment of cuts by."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.data import Rollout, finished_lengths
from trainer.output import table

PERCENTILES = (50, 90, 99)


def length_statistics(rollouts: Sequence[Rollout]) -> dict[str, dict[str, Any]]:
    """By domain, and of all: counts, and lengths in tokens; percentiles of finished ones."""
    parts: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        parts[rollout.domain].append(rollout)
    return {name: _statistics(parts[name]) for name in sorted(parts)} | {
        "all": _statistics(rollouts)
    }


def _statistics(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    lengths = [len(r.completion_ids) for r in rollouts]
    finished = finished_lengths(rollouts)
    percentiles = np.percentile(finished, PERCENTILES) if finished else [None] * len(PERCENTILES)
    return {
        "completions": len(lengths),
        "tokens": sum(lengths),
        "cut": len(lengths) - len(finished),
        "mean": float(np.mean(lengths)),
        **{f"p{p}": v and float(v) for p, v in zip(PERCENTILES, percentiles, strict=True)},
    }


def statistics_table(statistics: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row for each domain."""
    return table(
        [
            {"domain": name} | {c: None if v is None else f"{v:,.0f}" for c, v in row.items()}
            for name, row in statistics.items()
        ]
    )
