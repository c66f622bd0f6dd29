"""Figures of length control: how well each arm keeps the length, and what its texts are like."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.estimates import Estimate, Sample, estimate
from benchmarks.evidence.arms import chosen_by, fields
from benchmarks.evidence.measures import (
    deviation,
    distinct,
    ends_naturally,
    repetition,
    score,
)
from lenvm_vllm.api.continuation import narrowed
from lenvm_vllm.target.rails import bounds_of
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.text.sentences import ends_sentence, is_whole
from value_server.contract.units import UNITS, count

QUALITY = (
    *("unforced_share", "sentence_share", "whole_share"),
    *("repetition", "distinct_1", "distinct_2"),
)
CUTS = ("target", "kind", "language")


def judged(
    answer: dict[str, Any], likelihood: dict[str, Any] | None, unit: str = UNITS[0]
) -> dict[str, Any]:
    """The answer with its figures: in percent ls, ld and shares; nll in nats a token.

    Its length is then in the unit of the target.
    """
    tokens, target, mode = (answer[name] for name in ("length", "target", "mode"))
    length = tokens if unit == UNITS[0] else count(answer["text"], unit)
    text = answer["ids"][: tokens - (answer["finish"] == "stop")]
    own = {
        "length": length,
        "tokens": tokens,
        "ls": score(length, target, mode),
        "ld": deviation(length, target),
        "sentence_share": 100.0 * ends_sentence(answer["text"]),
        "whole_share": 100.0 * is_whole(answer["text"]),
        "repetition": 100 * repetition(text),
        "distinct_1": 100 * distinct(text, 1),
        "distinct_2": 100 * distinct(text, 2),
    }
    if likelihood:
        lasts = lasts_of(answer["arm"], mode, target, unit)
        natural = ends_naturally(answer["finish"], length, lasts, likelihood["p_end"])
        own |= {"unforced_share": 100.0 * natural, "nll": likelihood["nll"]}
    return answer | own


def lasts_of(arm: str, mode: str, target: int, unit: str = UNITS[0]) -> set[int]:
    """Lengths at which a guard rail of this arm makes the end: its own, and that of other
    endings where it may have some. Of words also a text that would have ended there anyway."""
    wish = (fields(arm, mode, target, unit) or {}).get("length_target")
    if wish is None:
        return set()
    own = LengthTarget.parse(wish)
    targets = [own] if own.endings == 1 else [own, narrowed(own)]
    return {last for target in targets if (last := bounds_of(target).last) is not None}


def measure(rows: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
    """Figures of some answers; `base`: those of the prompt arm to the same requests."""

    def sample(rows: Sequence[dict[str, Any]], name: str) -> Sample:
        known = [row for row in rows if row.get(name) is not None]
        return Sample([row[name] for row in known], [row["id"] for row in known])

    figures = {name: estimate(sample(rows, name)) for name in ("ls", "ld", "length", *QUALITY)}
    sizes = sample(rows, "sampled"), sample(rows, "tokens")
    figures["cost"] = estimate(*sizes, of=lambda sampled, kept: sampled / kept)
    pair = sample(rows, "nll"), sample(base, "nll")
    figures["ppl_ratio"] = estimate(*pair, of=lambda mine, free: np.exp(mine - free))
    return {name: figure for name, figure in figures.items() if figure.n}


def cells(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of each arm, of each of its modes, and of these by target, kind and language."""
    found = []
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    parts = [{}, *({"mode": mode} for mode in modes)]
    for cut in CUTS:
        values = sorted({row[cut] for row in rows})
        parts += [{"mode": mode, cut: value} for mode in modes for value in values]
    for part in parts:
        inside = [row for row in rows if part.items() <= row.items()]
        free = {_request(row): row for row in inside if row["arm"] == "prompt"}
        for arm in arms:
            if own := [row for row in inside if row["arm"] == arm]:
                base = [free[_request(row)] for row in own if _request(row) in free]
                found.append({"arm": arm, **part, "figures": measure(own, base)})
    return found


def _request(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["mode"], row["target"], row["id"]


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last line: of each arm its modes, and the quality over all of them."""
    arms: dict[str, Any] = {}
    for cell in found:
        own: dict[str, Estimate] = cell["figures"]
        if cell.keys() == {"arm", "figures"}:
            known = [name for name in ("cost", *QUALITY, "ppl_ratio") if name in own]
            arms[cell["arm"]] = {name: round(own[name].value, 3) for name in known}
            arms[cell["arm"]]["ci"] = {name: own[name].interval(3) for name in known}
        elif cell.keys() == {"arm", "mode", "figures"}:
            arms[cell["arm"]][cell["mode"]] = {
                **{name: round(own[name].value, 3) for name in ("ls", "ld")},
                **{f"{name}_ci": own[name].interval(3) for name in ("ls", "ld")},
                "n": own["ls"].n,
                "tasks": own["ls"].groups,
                "chosen_by": chosen_by(cell["arm"], cell["mode"]),
            }
    return {"arms": arms}


def tables(found: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by caption: the arms by mode, then LS and LD also by target, kind and language.

    chosen by: as of `chosen_by`; tasks: clusters that the intervals are of, n: answers.
    """
    captions = {}
    for cut in (None, *CUTS):
        rows = []
        for cell in found:
            if "mode" not in cell or (set(cell) & set(CUTS)) != ({cut} if cut else set()):
                continue
            figures = cell["figures"]
            kept = figures if cut is None else {name: figures[name] for name in ("ls", "ld")}
            names = {name: str(cell[name]) for name in ("mode", cut, "arm") if name}
            chosen = {"chosen by": chosen_by(cell["arm"], cell["mode"])}
            of = figures["ls"]
            rows.append({**names, **chosen, **kept, "tasks": of.groups, "n": of.n})
        captions[f"By {cut or 'mode'}"] = rows
    return captions
