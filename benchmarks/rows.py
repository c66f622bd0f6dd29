"""Results as JSON lines that a run which was stopped goes on from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SETTINGS_FILE = "settings.json"


class Rows(dict[str, dict[str, Any]]):
    """The rows of a file by their `key`; `add` appends one. A last line that was cut off goes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            if not line.endswith(b"\n"):
                break
            row = json.loads(line)
            self[row["key"]] = row
            whole += len(line)
        self._file = path.open("a")
        self._file.truncate(whole)

    def add(self, row: dict[str, Any]) -> None:
        self[row["key"]] = row
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write what shapes the rows of `folder`, once.

    Raises ValueError naming the first setting that they were made otherwise with.
    """
    path = folder / SETTINGS_FILE
    if path.exists():
        before = json.loads(path.read_text())
        for name in before | dict(settings):
            if before.get(name) != settings.get(name):
                raise ValueError(
                    f"{name}: {folder} was made with {before.get(name)!r}, this run has "
                    f"{settings.get(name)!r}; another --output starts anew"
                )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n")
