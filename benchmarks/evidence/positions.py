"""How far off is the predicted number of tokens to come, by how much is written (paper, Figure 6)?

Of finished texts, since of cut ones the truth is not known. Where a share of a text is written is
known only when it has ended; after a number of tokens, only texts that are longer have a figure.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.estimates import Estimate, Sample, estimate, median
from trainer.evaluation.figures import Predicted
from value_server.contract.values import length_from_logit

Floats = NDArray[np.float64]
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
WRITTEN = (16, 64, 256, 512)  # tokens
MEASURES = {"relative_error": ("median error, %", 100), "error": ("mean error, tokens", 1)}


def lengths(z: Floats, gamma: float) -> Floats:
    """Of logits, of any shape, the tokens to come."""
    found: Floats = length_from_logit(torch.from_numpy(z), gamma).numpy()
    return found


def by_position(texts: Sequence[Predicted], gamma: float) -> dict[str, dict[str, Estimate]]:
    """By position, `50%` of a text or `64` tokens: `relative_error`, the median of |L̂ - L| / L,
    and `error`, the mean of |L̂ - L| in tokens; L is to come, L̂ is predicted. Positions
    that no finished text has are left out."""

    def after(share: float) -> Callable[[int], int]:
        return lambda length: int(share * length)

    def written(tokens: int) -> Callable[[int], int]:
        return lambda _: tokens

    places = {f"{share:.0%}": after(share) for share in SHARES}
    places |= {str(tokens): written(tokens) for tokens in WRITTEN}
    errors = {name: _errors(texts, gamma, place) for name, place in places.items()}
    return {name: own for name, own in errors.items() if own["error"].n}


def _errors(
    texts: Sequence[Predicted], gamma: float, place: Callable[[int], int]
) -> dict[str, Estimate]:
    """place: tokens that are written of a text of so many."""
    relative, absolute, prompts = [], [], []
    for text in texts:
        length = len(text.rollout.completion_ids)
        at = place(length)
        if text.rollout.finished and at < len(text.z):
            error = abs(float(lengths(text.z[at : at + 1], gamma)[0]) - (length - at))
            relative.append(error / (length - at))
            absolute.append(error)
            prompts.append(text.rollout.prompt_id)
    return {
        "relative_error": median(Sample(relative, prompts)),
        "error": estimate(Sample(absolute, prompts)),
    }


def table_rows(models: Mapping[str, Mapping[str, Mapping[str, Estimate]]]) -> list[dict[str, Any]]:
    """For each measure a row for each model, a column for each position; and the texts there."""
    rows: list[dict[str, Any]] = [
        {"model": name, "": label}
        | {position: own[measure].scaled(factor) for position, own in positions.items()}
        for measure, (label, factor) in MEASURES.items()
        for name, positions in models.items()
    ]
    first = next(iter(models.values()))
    counts = {position: str(own["error"].n) for position, own in first.items()}
    return [*rows, {"model": "", "": "texts"} | counts]
