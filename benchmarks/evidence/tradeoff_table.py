"""Figures of the trade-off: accuracy and tokens of each arm at each of its dials."""

from collections.abc import Sequence
from typing import Any

from benchmarks.estimates import Sample, estimate

OURS = ("tilt", "at_most", "few+at_most")
NAMES = ("accuracy", "tokens")


def points_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy in percent and mean tokens of each arm and dial."""
    points = []
    for arm, dial in dict.fromkeys((row["arm"], row["dial"]) for row in rows):
        own = [row for row in rows if (row["arm"], row["dial"]) == (arm, dial)]
        groups = [row["id"] for row in own]
        accuracy = estimate(Sample([100.0 * row["right"] for row in own], groups))
        tokens = estimate(Sample([row["length"] for row in own], groups))
        points.append({"arm": arm, "dial": dial, "accuracy": accuracy, "tokens": tokens})
    return points


def summary(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last line. Shares of the free accuracy at the largest budget whose hard cut keeps at
    most a third of it; ours is its best point that needs no more tokens than that cut."""
    flat = [
        {"arm": p["arm"], "dial": p["dial"], "n": p["accuracy"].n}
        | {name: round(p[name].value, 2) for name in NAMES}
        | {f"{name}_ci": p[name].interval(2) for name in NAMES}
        for p in points
    ]
    (free,) = (p for p in flat if p["arm"] == "free")
    result: dict[str, Any] = {"free": free, "points": [p for p in flat if p is not free]}
    poor = [p for p in flat if p["arm"] == "budget" and 3 * p["accuracy"] <= free["accuracy"]]
    if poor and free["accuracy"]:
        hard = max(poor, key=lambda p: p["tokens"])
        ours = [p["accuracy"] for p in flat if p["arm"] in OURS and p["tokens"] <= hard["tokens"]]
        result |= {
            "budget": hard["dial"],
            "budget_tokens": hard["tokens"],
            "hard_kept": round(hard["accuracy"] / free["accuracy"], 3),
            "ours_kept": round(max(ours) / free["accuracy"], 3) if ours else None,
        }
    return result


def table_rows(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of a table for each point."""
    return [
        {"arm": p["arm"], "dial": p["dial"], "pass@1, %": p["accuracy"], "tokens": p["tokens"]}
        | {"n": p["accuracy"].n}
        for p in points
    ]
