"""Arms of several runs side by side, on the requests that all of them answered.

    python -m benchmarks.evidence.compare runs/exact:single runs/ahead:single [--second MODEL]

For what one run cannot hold: another value model, or other settings of the plugin. Perplexities
are those under the served model over the first arm's. A second model, which had no part in the
texts, tells its own perplexity, how often it gives an end at least 0.05 after a text, and how often
it says that the text comes to a proper end.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App

from benchmarks.estimates import Sample, estimate
from benchmarks.evidence.arms import chosen_by
from benchmarks.evidence.lifebench import SETTINGS
from benchmarks.evidence.lifebench_table import CUTS, judged, measure
from benchmarks.evidence.second import opinions
from benchmarks.figures import FIGURES_FILE, read_figures, write_figures
from benchmarks.provenance import KEY, end
from lenvm_vllm.steering.constants import NATURAL
from trainer.checks import check, check_choice
from trainer.output import OnlyJson, table
from trainer.resume import SETTINGS_FILE
from trainer.rows import Rows
from value_server.contract.units import UNITS

app = App(help=__doc__)
COLUMNS = (
    *("ls", "ld", "unforced_share", "whole_share", "sentence_share"),
    *("repetition", "cost", "ppl_ratio"),
)


@app.default
def main(
    *arms: str,
    second: str | None = None,
    unit: str = UNITS[0],
    by: str | None = None,
    output: Path = Path("runs/compare"),
    only_json: OnlyJson = False,
) -> None:
    """Print a row for each mode and arm and, as the last line, one JSON object.

    Parameters
    ----------
    arms
        FOLDER:ARM, where FOLDER is a run of `lifebench` or `ends`.
    second
        Hub name or folder of another instruct model.
    unit
        Of the lengths that were asked for.
    by
        target, kind or language: a row for each of its values too.
    output
        Folder of the figures.
    """
    if by is not None:
        check_choice("by", by, CUTS)
    runs = {folder_of(arm): made(Path(folder_of(arm)), unit) for arm in arms}
    texts = {arm: read(arm, unit) for arm in arms}
    shared = set.intersection(*(set(own) for own in texts.values()))
    if not shared:
        raise ValueError(f"arms: {arms}, have no request in common")
    rows = {arm: [own[request] for request in sorted(shared)] for arm, own in texts.items()}
    if second is not None:
        for arm, own in rows.items():
            found = opinions(own, second, Path(folder_of(arm)))
            rows[arm] = [_with(row, opinion) for row, opinion in zip(own, found, strict=True)]
    parts = [{"mode": mode} for mode in values_of("mode", rows)]
    if by is not None:
        parts += [{**part, by: value} for part in parts for value in values_of(by, rows)]
    named = {
        " ".join([arm, *map(str, part.values())]): figures(mine, _of(rows[arms[0]], part))
        for part in parts
        for arm, own in rows.items()
        if (mine := _of(own, part))
    }
    result = {"unit": unit, "second": second, "runs": runs, "arms": named}
    write_figures(output, result)
    end(result, table([{"arm": name, **line} for name, line in named.items()]), only_json)


def made(folder: Path, unit: str) -> dict[str, Any]:
    """How a run's answers came, as far as its folder tells: its settings, and its provenance once
    it has ended. Raises ValueError where its lengths are in another unit."""
    found: dict[str, Any] = {}
    if (folder / SETTINGS_FILE).exists():
        found["settings"] = own = json.loads((folder / SETTINGS_FILE).read_text())
        asked = SETTINGS.get(own.get("unit", UNITS[0]), own.get("unit"))
        check(unit == asked, "unit", unit, f"{asked} for {folder}")
    if (folder / FIGURES_FILE).exists():
        found[KEY] = read_figures(folder).get(KEY)
    return found


def read(arm: str, unit: str) -> dict[tuple[str, int, str, str], dict[str, Any]]:
    """The judged answers of FOLDER:ARM by mode, target, task and prompt. Raises ValueError for one
    that its folder has none of."""
    folder, name = Path(folder_of(arm)), arm[len(folder_of(arm)) + 1 :]
    answers, scores = Rows(folder / "answers.jsonl"), Rows(folder / "scores.jsonl")
    found = {
        (row["mode"], row["target"], row["id"], row["request"]): judged(row, scores.get(key), unit)
        for key, row in answers.items()
        if row["arm"] == name
    }
    if not found:
        raise ValueError(f"arms: {arm!r}, {folder} has no answers of the arm {name!r}")
    return found


def folder_of(arm: str) -> str:
    return arm.partition(":")[0]


def figures(rows: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of an arm; base: the first arm's answers to the same requests."""
    known = measure(rows, base)
    own: dict[str, Any] = {name: known[name] for name in COLUMNS if name in known}
    if "second_nll" in rows[0]:
        pair = _sample(rows, "second_nll"), _sample(base, "second_nll")
        own["second_ppl_ratio"] = estimate(*pair, of=lambda mine, first: np.exp(mine - first))
        for name in ("second_natural", "second_ends", "second_agrees"):
            own[name] = estimate(_sample(rows, name))
    tasks = len({row["id"] for row in rows})
    return {"chosen by": chosen_by(rows[0]["arm"], rows[0]["mode"]), **own} | {
        "tasks": tasks,
        "n": len(rows),
    }


def _with(row: dict[str, Any], opinion: dict[str, Any]) -> dict[str, Any]:
    """The row and the second opinion of it; agrees: with the test for the end of a sentence."""
    return row | {
        "second_agrees": 100.0 * (opinion["ends"] == (row["sentence_share"] > 0)),
        "second_nll": opinion["nll"],
        "second_natural": 100.0 * (opinion["p_end"] >= NATURAL),
        "second_ends": 100.0 * opinion["ends"],
    }


def _sample(rows: Sequence[dict[str, Any]], name: str) -> Sample:
    known = [row for row in rows if row.get(name) is not None]
    return Sample([row[name] for row in known], [row["id"] for row in known])


def values_of(name: str, rows: Mapping[str, Sequence[dict[str, Any]]]) -> list[Any]:
    """Of a fact of the answers, in order."""
    return sorted({row[name] for own in rows.values() for row in own})


def _of(rows: Sequence[dict[str, Any]], part: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in rows if part.items() <= row.items()]


if __name__ == "__main__":
    app()
