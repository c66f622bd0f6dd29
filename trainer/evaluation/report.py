"""A page about one model: whom its lengths fit, and whom they do not. Plain HTML that loads nothing
and runs nothing; what stands in it of prompts is escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checks import check
from trainer.evaluation.card import evaluation_text, result_rows
from trainer.evaluation.figures import (
    POSITIONS,
    Predicted,
    explained,
    length_errors,
    squared_errors,
)
from trainer.evaluation.forecasts import ALL, Forecasts, forecasts_of, together
from trainer.plots import calibration_svg
from value_server.contract.checkpoint import LenvmConfig

WORST = 20  # prompts that are shown
SHOWN = 300  # characters of each

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border: 1px solid #ccc; padding: .2rem .6rem; text-align: right; vertical-align: top }
td { white-space: nowrap }
th:first-child, td:first-child { text-align: left; min-width: 10rem; overflow-wrap: anywhere;
  white-space: normal }
svg { max-width: 100%; height: auto; background: white }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def check_page(field: str, path: Path | None) -> None:
    """Raises ValueError unless a page can be written under that name."""
    good = path is None or (path.suffix == ".html" and path.parent.is_dir())
    check(good, field, str(path), "a name in .html, in a folder that is there")


def write_report(
    path: Path,
    checkpoint: Path,
    config: LenvmConfig,
    figures: Mapping[str, Any],
    texts: Sequence[Predicted],
) -> None:
    """figures: of `lenvm evaluate`. texts: those that it was about, by this checkpoint."""
    forecasts = forecasts_of(texts, config.gamma)
    name = escape(checkpoint.resolve().name)
    factors = _factors(together(forecasts))
    half, most = np.quantile(factors, [0.5, 0.9])
    parts = [
        f"<h1>{name}</h1>",
        f"<p>A value model on {escape(config.base_model)}, gamma {config.gamma:.6g}. "
        f"{escape(evaluation_text(figures))}</p>",
        _table(result_rows(figures)),
        "<h2>Calibration</h2>",
        "<p>Left: all places of all texts, in ten equal parts by what was predicted; on the dotted "
        "line the mean is right. Right: the median error of what was still to come, by the share "
        "of the text that was written.</p>",
        calibration_svg(figures),
        "<h2>By domain and position</h2>",
        "<p>Median |error| of a prompt's forecast, and of the tokens to come where a share of the "
        "text is written.</p>",
        _table(_by_domain(texts, forecasts, config.gamma)),
        "<h2>The worst prompts</h2>",
        f"<p>Half of all prompts are foretold within a factor of {half:.2f}, nine tenths within "
        f"{most:.2f}. Those furthest off, in either direction (≥: completions were cut):</p>",
        _table(_worst(texts, forecasts)),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{name}</title><style>{_STYLE}</style></head><body>\n"
    )
    path.write_text(page + "\n".join(parts) + "\n</body></html>\n", encoding="utf-8")


def _by_domain(
    texts: Sequence[Predicted], forecasts: Mapping[str, Forecasts], gamma: float
) -> list[dict[str, str]]:
    rows = []
    for domain, own in {**forecasts, ALL: together(forecasts)}.items():
        members = [t for t in texts if domain == ALL or t.rollout.domain == domain]
        finished = [text for text in members if text.rollout.finished]
        errors = length_errors(finished, gamma)
        at = {f"at {p:.0%}": errors.get(str(p)) for p in POSITIONS}
        row = {
            "domain": domain,
            "prompts": f"{len(own.prompts)}",
            "completions": f"{len(members)}",
            "mean length": f"{own.mean_length.mean():.0f}",
            "forecast": f"{np.median(own.errors):.0%}",
        }
        row |= {name: "" if error is None else f"{error:.0%}" for name, error in at.items()}
        r2 = explained(*squared_errors(finished)) if finished else None
        rows.append(row | {"R²": "" if r2 is None else f"{r2:.2f}"})
    return rows


def _worst(texts: Sequence[Predicted], forecasts: Mapping[str, Forecasts]) -> list[dict[str, str]]:
    said = {(t.rollout.domain, t.rollout.prompt_id): t.rollout.prompt for t in texts}
    cut = {(t.rollout.domain, t.rollout.prompt_id) for t in texts if not t.rollout.finished}
    domains = [domain for domain, own in forecasts.items() for _ in own.prompts]
    own = together(forecasts)
    factors = _factors(own)
    rows = []
    for i in np.argsort(-factors, kind="stable")[:WORST]:
        prompt = own.prompts[i]
        text = said[domains[i], prompt] or f"prompt_id {prompt}"
        least = "≥ " if (domains[i], prompt) in cut else ""
        rows.append(
            {
                "prompt": text if len(text) <= SHOWN else text[:SHOWN] + "…",
                "domain": domains[i],
                "length": f"{least}{own.length[i]:.0f}",
                "foretold": f"{own.predicted[i]:.0f}",
                "factor": f"{factors[i]:.1f}",
            }
        )
    return rows


def _factors(own: Forecasts) -> np.ndarray[Any, Any]:
    """(N,) how many times too long or too short each prompt's forecast is, at least 1."""
    ratio = own.predicted / own.length
    return np.maximum(ratio, 1 / ratio)


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row.values()) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>\n{body}</table>"
