"""Files of completions, a file for so many prompts; each remembers what it was sampled with."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.columns import SCHEMA, schema_of
from trainer.pictures import with_bytes
from trainer.resume import check_same
from trainer.rollout_files import TokenizerOf
from trainer.rollouts.prompts import Prompt

SETTINGS_KEY = b"lenvm"


@dataclass(frozen=True, slots=True)
class Shard:
    """A Parquet file, there or not. settings: what its completions are sampled with."""

    path: Path
    prompts: Sequence[Prompt]
    settings: Mapping[str, Any]

    def is_there(self) -> bool:
        """Raises ValueError naming the first setting that the file was sampled otherwise with."""
        if not self.path.exists():
            return False
        metadata = schema_of(self.path).metadata or {}
        if SETTINGS_KEY in metadata:
            check_same(self.path, json.loads(metadata[SETTINGS_KEY]), self.settings)
        return True

    def write(self, rows: Sequence[Mapping[str, Any]], tokenizer: TokenizerOf | None) -> None:
        """Rows of SCHEMA, ids of `tokenizer`, so that the file exists only when complete."""
        unfinished = self.path.with_suffix(".tmp")
        told = tokenizer.metadata() if tokenizer else {}
        schema = SCHEMA.with_metadata({SETTINGS_KEY: json.dumps(self.settings).encode(), **told})
        pq.write_table(pa.Table.from_pylist(with_bytes(rows), schema=schema), unfinished)
        os.replace(unfinished, self.path)


def shards_of(
    prompts: Iterable[Prompt], folder: Path, size: int, settings: Mapping[str, Any]
) -> Iterator[Shard]:
    """A shard for every `size` prompts, in order."""
    rest, number = iter(prompts), 0
    while part := tuple(islice(rest, size)):
        digest = hashlib.sha256(_told(part).encode()).hexdigest()[:16]
        yield Shard(folder / f"part-{number:05d}.parquet", part, {**settings, "prompts": digest})
        number += 1


def _told(prompts: Sequence[Prompt]) -> str:
    """All that the prompts are, in the form of before they had more where none has."""
    more = [(p.system, p.pictures, p.turns) for p in prompts]
    if any(p.pictures or p.turns for p in prompts):
        return repr([(p.id, p.domain, p.text, *own) for p, own in zip(prompts, more, strict=True)])
    texts = (f"Prompt(id={p.id!r}, domain={p.domain!r}, text={p.text!r})" for p in prompts)
    systems = [p.system for p in prompts]
    return repr(prompts) if any(systems) else f"({', '.join(texts)}{',' * (len(systems) == 1)})"
