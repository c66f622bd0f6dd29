"""Pictures in files of rollouts: named in each row, their bytes once a file.

pictures        of the row's prompt, in order: the sha256 of each
picture_bytes   their bytes, null where an earlier row of the file has them
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from trainer.checks import check
from trainer.data import Rollout
from value_server.model.pictures import Picture, open_picture

MAX_PICTURES = 32  # of a prompt
PICTURES, BYTES = "pictures", "picture_bytes"
FIELDS = [(PICTURES, pa.list_(pa.string())), (BYTES, pa.list_(pa.large_binary()))]


def with_bytes(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a file, of rows whose `pictures`, if any, are Pictures."""
    told: set[str] = set()
    found = []
    for row in rows:
        data = []
        for picture in row.get(PICTURES) or ():
            data.append(None if picture.sha256 in told else picture.data)
            told.add(picture.sha256)
        names = [picture.sha256 for picture in row.get(PICTURES) or ()]
        found.append({**row, PICTURES: names or None, BYTES: data or None})
    return found


class PicturesOf:
    """Those of files as they are read, each held in memory once."""

    def __init__(self) -> None:
        self._known: dict[str, Picture] = {}

    def take(self, file: object, row: Mapping[str, Any]) -> tuple[Picture, ...]:
        """Of the next row. Raises ValueError naming file, prompt and what is missing or wrong."""
        names, data = row.get(PICTURES) or [], row.get(BYTES) or []
        place = f"{file}: prompt {row['prompt_id']}"
        check_count(place, len(names))
        for number, content in enumerate(data):
            if content is not None:
                picture = Picture.of(content)
                if names[number : number + 1] != [picture.sha256]:
                    what = f"{BYTES}[{number}] has sha256 {picture.sha256}"
                    raise ValueError(f"{place}: {what}, {PICTURES} tells another")
                self._known.setdefault(picture.sha256, picture)
        if lost := [name for name in names if name not in self._known]:
            raise ValueError(
                f"{place}: {PICTURES}: {lost[0]} has no bytes, here or in a row before it"
            )
        return tuple(self._known[name] for name in names)


def check_count(place: str, count: int) -> None:
    """Raises ValueError where a prompt has too many."""
    check(count <= MAX_PICTURES, f"{place}: pictures", count, f"at most {MAX_PICTURES}")


def check_pictures(rollouts: Sequence[Rollout]) -> None:
    """Open each once. Raises ValueError naming the prompt of one that cannot be read."""
    seen: set[str] = set()
    for rollout in rollouts:
        for number, picture in enumerate(rollout.pictures):
            if picture.sha256 not in seen:
                seen.add(picture.sha256)
                open_picture(picture.data, f"prompt {rollout.prompt_id}: pictures[{number}]")
