"""Plots of the figures that the harnesses keep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.estimates import Estimate
from benchmarks.evidence.inversion import amplification

DPI = 100


def plot_control(found: Sequence[Mapping[str, Any]], path: Path, unit: str) -> None:
    """LS of equal_to over the target, an arm a line; and what the arms' texts are like."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    cells = [c for c in found if c.get("mode") == "equal_to"]
    for arm in dict.fromkeys(c["arm"] for c in cells):
        own = [c for c in cells if c["arm"] == arm and "target" in c]
        x = [c["target"] for c in own]
        _with_bars(left, x, [c["figures"]["ls"] for c in own], arm)
        (whole,) = (c for c in cells if c["arm"] == arm and c.keys() == {"arm", "mode", "figures"})
        if "ppl_ratio" in whole["figures"]:
            at = [whole["figures"]["ppl_ratio"].value]
            _with_bars(right, at, [whole["figures"]["unforced_share"]], arm)
    left.set(xscale="log", xlabel=f"target, {unit}", ylabel="length score")
    left.set_xticks(ticks := sorted({c["target"] for c in cells if "target" in c}), map(str, ticks))
    left.minorticks_off()
    left.legend()
    right.set(xlabel="perplexity over that of free samples", ylabel="natural ends, %")
    if len(right.containers):
        right.legend()
    figure.savefig(path, dpi=DPI)


def plot_tradeoff(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy over mean tokens, and over those that were sampled for them, an arm a line.

    Runs that did not keep the sampled ones have the first panel alone.
    """
    costs = {"tokens": "mean completion tokens", "sampled": "mean tokens sampled"}
    costs = {name: label for name, label in costs.items() if all(name in p for p in points)}
    figure = Figure(figsize=(7 * len(costs), 4.5), layout="constrained")
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axis, (name, label) in zip(panels, costs.items(), strict=True):
        for arm in dict.fromkeys(p["arm"] for p in points):
            own = [p for p in points if p["arm"] == arm]
            own.sort(key=lambda p: p[name].value)
            _with_bars(axis, [p[name].value for p in own], [p["accuracy"] for p in own], arm)
        axis.set(xlabel=label, ylabel="pass@1, %")
    panels[0].legend()
    figure.savefig(path, dpi=DPI)


def plot_grid(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Squared error of each run, an axis of the grid a panel."""
    axes = list(dict.fromkeys(run["axis"] for run in runs))
    figure = Figure(figsize=(2.8 * len(axes), 3.2), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        own = [run for run in runs if run["axis"] == axis]
        _with_bars(panel, [run["setting"] for run in own], [r["figures"]["loss"] for r in own], "")
        panel.tick_params("x", rotation=30)
        panel.set_xlabel(axis)
    panels[0].set_ylabel("squared error of u")
    figure.savefig(path, dpi=DPI)


def plot_prediction(figures: Mapping[str, Any], path: Path) -> None:
    """Errors by position, a model a line; and what an error of u is as one of a length, measured
    and, as lines, for small errors, a colour each gamma."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    shares, written, factors = figure.subplots(1, 3)
    for name, own in figures["positions"].items():
        for panel, of_share in ((shares, True), (written, False)):
            there = {p: e for p, e in own.items() if p.endswith("%") == of_share}
            errors = [e["relative_error"] for e in there.values()]
            _with_bars(panel, [*there], [error.scaled(100) for error in errors], name)
            panel.set(yscale="log", ylabel="median |error| / tokens to come, %")
    shares.set_xlabel("of the text written")
    written.set_xlabel("tokens written")
    shares.legend()
    measured = figures["inversion"]["measured"]
    length = np.geomspace(1, 1024)
    for gamma in dict.fromkeys(row["gamma"] for row in measured):
        own = [row for row in measured if row["gamma"] == gamma]
        x = [row["mean_length"] for row in own]
        _with_bars(factors, x, [row["ratio"] for row in own], f"gamma {gamma:.5g}", "o")
        line = amplification(length, gamma)
        factors.plot(length, line, color=factors.containers[-1].lines[0].get_color())
    factors.set(xscale="log", yscale="log", ylim=(1, 1e4), xlabel="tokens to come")
    factors.set_ylabel("relative error of the length / error of u")
    factors.legend()
    figure.savefig(path, dpi=DPI)


def _with_bars(
    axis: Axes, x: Sequence[Any], figures: Sequence[Estimate], label: str, form: str = "o-"
) -> None:
    """Values over x with their intervals."""
    bars = [[f.value - f.low for f in figures], [f.high - f.value for f in figures]]
    axis.errorbar(x, [f.value for f in figures], np.abs(bars), fmt=form, capsize=2, label=label)
