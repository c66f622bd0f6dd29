"""JSON lines: data to read, and results that a run which was stopped goes on from."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHOWN = 80  # characters of a bad value in a message


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Of a file, plain or gzip: where each line stands, for messages, and the line.

    Raises ValueError where the file is called gzip and is none, or not a whole one.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                yield f"{path}: line {number}", line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from error


def row_of(place: str, line: bytes) -> dict[str, Any]:
    """Raises ValueError naming the place where a line holds no object."""
    try:
        row = json.loads(line.decode())
        if b"\\ud" in line.lower():  # half a character, as of a text cut in JavaScript, is none
            json.dumps(row, ensure_ascii=False).encode()
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object, got {repr(row)[:SHOWN]}")
    return row


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Of a file, plain or gzip. Raises ValueError naming the line that holds no object."""
    for place, line in read_lines(path):
        yield row_of(place, line)


class Rows(dict[str, dict[str, Any]]):
    """The rows of a file by their `key`; `add` appends one. A last line that was cut off goes.

    Without a file they are in memory alone. Raises ValueError naming a line that holds no row.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self.path = path
        self._file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        for place, line in read_lines(path) if path.exists() else ():
            if not line.endswith(b"\n"):
                break
            row = row_of(place, line)
            if "key" not in row:
                raise ValueError(f"{place}: key: missing")
            self[row["key"]] = row
            whole += len(line)
        self._file = path.open("a")
        self._file.truncate(whole)

    def add(self, row: dict[str, Any]) -> None:
        self[row["key"]] = row
        if self._file:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """No more rows are added."""
        if self._file:
            self._file.close()
