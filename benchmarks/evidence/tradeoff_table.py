"""Figures of the trade-off: accuracy and tokens of each arm at each of its dials."""

from collections.abc import Sequence
from typing import Any

from benchmarks.estimates import Sample, estimate

OURS = ("tilt", "at_most", "few+at_most")
NAMES = ("accuracy", "tokens", "sampled")


def points_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy in percent, mean tokens, and mean tokens that were sampled, those of other endings
    too, of each arm and dial."""
    points = []
    for arm, dial in dict.fromkeys((row["arm"], row["dial"]) for row in rows):
        own = [row for row in rows if (row["arm"], row["dial"]) == (arm, dial)]
        groups = [row["id"] for row in own]
        accuracy = estimate(Sample([100.0 * row["right"] for row in own], groups))
        tokens = estimate(Sample([row["length"] for row in own], groups))
        sampled = estimate(Sample([row["sampled"] for row in own], groups))
        figures = {"accuracy": accuracy, "tokens": tokens, "sampled": sampled}
        points.append({"arm": arm, "dial": dial, **figures})
    return points


def summary(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last line. Shares of the free accuracy at the largest budget whose hard cut keeps at
    most a third of it; ours is its best point that needs no more tokens than that cut. Both are
    chosen by the accuracy that they report, which flatters them: `chosen_by` says so."""
    flat = []
    for p in points:
        known = [name for name in NAMES if name in p]  # older runs have no sampled tokens
        row = {"arm": p["arm"], "dial": p["dial"]}
        row |= {"n": p["accuracy"].n, "questions": p["accuracy"].groups}
        row |= {name: round(p[name].value, 2) for name in known}
        flat.append(row | {f"{name}_ci": p[name].interval(2) for name in known})
    (free,) = (p for p in flat if p["arm"] == "free")
    result: dict[str, Any] = {"free": free, "points": [p for p in flat if p is not free]}
    poor = [p for p in flat if p["arm"] == "budget" and 3 * p["accuracy"] <= free["accuracy"]]
    if poor and free["accuracy"]:
        hard = max(poor, key=lambda p: p["tokens"])
        near = [p for p in flat if p["arm"] in OURS and p["tokens"] <= hard["tokens"]]
        best = max(near, key=lambda p: p["accuracy"], default=None)
        result |= {
            "budget": hard["dial"],
            "budget_tokens": hard["tokens"],
            "hard_kept": round(hard["accuracy"] / free["accuracy"], 3),
            "ours_kept": best and round(best["accuracy"] / free["accuracy"], 3),
            "ours": best and {"arm": best["arm"], "dial": best["dial"], "of": len(near)},
            "chosen_by": "accuracy",
        }
    return result


def table_rows(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of a table for each point."""
    return [
        {"arm": p["arm"], "dial": p["dial"], "pass@1, %": p["accuracy"], "tokens": p["tokens"]}
        | {"sampled": p.get("sampled"), "questions": p["accuracy"].groups, "n": p["accuracy"].n}
        for p in points
    ]
