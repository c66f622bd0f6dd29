"""What a run was made with: one that was stopped goes on with the same settings only."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SETTINGS_FILE = "settings.json"
ELSEWHERE = "another output folder"


def check_same(
    place: Path, before: Mapping[str, Any], now: Mapping[str, Any], anew: str = ELSEWHERE
) -> None:
    """Raises ValueError naming the first setting that `place` was made otherwise with.

    anew: what starts from the beginning, for the message.
    """
    for name in [*before, *now]:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{name}: {place} was made with {before.get(name)!r}, this run has "
                f"{now.get(name)!r}; {anew} starts anew"
            )


def keep_settings(folder: Path, settings: Mapping[str, Any], anew: str = ELSEWHERE) -> None:
    """Write into `folder` what shapes its content; raises ValueError if that was another."""
    path = folder / SETTINGS_FILE
    if path.exists():
        check_same(folder, json.loads(path.read_text()), settings, anew)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n")


def fingerprint(settings: Any) -> str:
    """The same for the same settings, which are JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
