"""What a run was made with: one that was stopped goes on with the same settings only.

Settings and data must be the same. What was computed of the data need not be: its last digits
differ with the number of threads and the machine.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SETTINGS_FILE = "settings.json"
ELSEWHERE = "another output folder"
ANEW = "--no-resume"
ROUNDING = 1e-9  # relative: sums of the same numbers in another order differ by less


def check_same(
    place: Path, before: Mapping[str, Any], now: Mapping[str, Any], anew: str = ELSEWHERE
) -> None:
    """Raises ValueError naming the first setting that `place` was made otherwise with.

    anew: what starts from the beginning, for the message.
    """
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{name}: {place} was made with {before.get(name)!r}, this run has "
                f"{now.get(name)!r}; {anew} starts anew"
            )


def keep_settings(
    folder: Path,
    settings: Mapping[str, Any],
    anew: str = ELSEWHERE,
    found: Iterable[str] = (),
) -> None:
    """Write into `folder` what shapes its content; raises ValueError if that was another.

    found: see `as_before`.
    """
    path = folder / SETTINGS_FILE
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not whole: {error}; {anew} starts anew") from error
        check_same(folder, before, as_before(before, settings, found), anew)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")  # a run may be killed any time
    unfinished.write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(unfinished, path)


def as_before(
    before: Mapping[str, Any], now: Mapping[str, Any], found: Iterable[str] = ()
) -> dict[str, Any]:
    """`now`, with the numbers of `before` where they differ by rounding alone, and with its
    `found`: settings in name only, which shape nothing."""
    both = before.keys() & now.keys()
    same = {name for name in both if is_rounded(before[name], now[name])}
    return {**now, **{name: before[name] for name in same | (both & {*found})}}


def is_rounded(one: Any, other: Any) -> bool:
    """Whether both are floats that differ by rounding at most."""
    both = isinstance(one, float) and isinstance(other, float)
    return both and math.isclose(one, other, rel_tol=ROUNDING)


def fingerprint(settings: Any) -> str:
    """The same for the same settings, which are JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
