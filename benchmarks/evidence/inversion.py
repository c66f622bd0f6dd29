"""What error of u makes what error of a length (paper, Figure 7)?

L = log(1 - u) / log gamma, so for small errors |dL| / L = |du| e^x / x, where x = -L log gamma is
the length in units of the discount. The factor is e at x = 1 and larger everywhere else: near the
end of a text by 1 / x, far from it exponentially, where u is close to 1 whatever the length.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.estimates import Estimate, Sample, estimate
from benchmarks.evidence.positions import lengths
from trainer.evaluation.figures import Predicted
from value_server.contract.values import value_from_length

Floats = NDArray[np.float64]
LENGTHS = (16, 64, 256, 1024)  # tokens to come
ERROR_OF_U = 0.01
BINS = (1, 17, 65, 257)  # first of each, tokens to come


def amplification(length: Floats, gamma: float) -> Floats:
    """e^x / x: relative error of a length for each unit of a small error of its u."""
    x = -length * np.log(gamma)
    factor: Floats = np.exp(x) / x
    return factor


def inverted(length: float, error_of_u: float, gamma: float) -> float | None:
    """(L̂ - L) / L of the length that is read from u + error_of_u; u below 0 is no length, 0,
    and None where u is 1 or more, which no length has."""
    u = -np.expm1(length * np.log(gamma)) + error_of_u
    return None if u >= 1 else float(np.log1p(-max(u, 0)) / np.log(gamma) / length - 1)


def exact(gammas: Sequence[float]) -> list[dict[str, Any]]:
    """What follows from the definition, at LENGTHS: the factor, and errors by ± ERROR_OF_U."""
    return [
        {
            **{"gamma": gamma, "length": length, "error_of_u": ERROR_OF_U},
            "amplification": float(amplification(np.array(float(length)), gamma)),
            "too_small": inverted(length, -ERROR_OF_U, gamma),
            "too_large": inverted(length, ERROR_OF_U, gamma),
        }
        for gamma in gammas
        for length in LENGTHS
    ]


def measured(
    texts: Sequence[Predicted], gamma: float, gammas: Sequence[float]
) -> list[dict[str, Any]]:
    """Of all tokens of finished texts, by tokens to come: mean |du|, mean |dL| / L, the second over
    the first, and what the factor for small errors would make of the first.

    gamma: of the logits. The lengths stay the same under every gamma; what changes is u.
    """
    finished = [text for text in texts if text.rollout.finished]
    groups = np.array([text.rollout.prompt_id for text in finished for _ in text.z])
    length = np.concatenate([_to_come(text) for text in finished])
    predicted = np.concatenate([lengths(text.z, gamma) for text in finished])
    relative = np.abs(predicted - length) / length
    place = np.searchsorted(BINS, length, "right") - 1
    rows = []
    for own in gammas:
        of_u = np.abs(_values(predicted, own) - _values(length, own))
        linear = of_u * amplification(length, own)
        for i, name in enumerate(_names()):
            there = place == i
            if there.any():
                parts = (x[there].tolist() for x in (of_u, relative, linear))
                u, error, law = (Sample(part, groups[there].tolist()) for part in parts)
                row = {"gamma": own, "length": name, "mean_length": float(length[there].mean())}
                row |= {"error_of_u": estimate(u), "error_of_length": estimate(error)}
                rows.append(row | {"ratio": _ratio(error, u), "ratio_if_small": _ratio(law, u)})
    return rows


def _to_come(text: Predicted) -> Floats:
    """(K,) tokens."""
    length = len(text.rollout.completion_ids)
    return np.arange(length, length - len(text.z), -1, dtype=np.float64)


def _values(length: Floats, gamma: float) -> Floats:
    u: Floats = value_from_length(torch.from_numpy(length), gamma).numpy()
    return u


def _names() -> Iterator[str]:
    for first, following in zip(BINS, [*BINS[1:], None], strict=True):
        yield f"{first} to {following - 1}" if following else f"{first} and more"


def _ratio(above: Sample, below: Sample) -> Estimate:
    return estimate(above, below, of=lambda a, b: a / b)


def exact_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each length, a column for each gamma."""
    gammas = dict.fromkeys(row["gamma"] for row in rows)
    rows_of = dict.fromkeys(row["length"] for row in rows)
    at = {(row["gamma"], row["length"]): row for row in rows}
    return [
        {"tokens to come": length} | {f"gamma {g:.5g}": _both(at[g, length]) for g in gammas}
        for length in rows_of
    ]


def _both(row: dict[str, Any]) -> str:
    ends = (row["too_small"], row["too_large"])
    low, high = ("none" if end is None else f"{end:+.1%}" for end in ends)
    return f"{low}, {high}"


def measured_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """n: tokens."""
    return [
        {
            **{"gamma": f"{row['gamma']:.5g}", "tokens to come": row["length"]},
            "error of u": row["error_of_u"],
            "relative error of length": row["error_of_length"],
            "ratio": row["ratio"],
            "ratio if errors were small": row["ratio_if_small"],
            "n": row["error_of_u"].n,
        }
        for row in rows
    ]
