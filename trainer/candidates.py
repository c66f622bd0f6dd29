"""Next tokens with their exact values: what `lenvm distil` writes and a lookahead head learns.

Legend: T tokens of a text, N of its positions, K candidates. A candidate of a position is a token
that may follow it; none ends the text, whose value then is known.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from trainer.resume import check_same
from value_server.contract.values import logit_in_gamma

SETTINGS_KEY = b"lenvm"
SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("positions", pa.list_(pa.int32())),
        ("ids", pa.list_(pa.int32())),
        ("p", pa.list_(pa.float32())),
        ("z", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Of one text. positions (N,): the token that they follow, ascending; ids (N, K);
    p (N, K): the served model's probabilities, z (N, K): the teacher's logits after each."""

    positions: NDArray[np.int64]
    ids: NDArray[np.int64]
    p: NDArray[np.float32]
    z: NDArray[np.float32]

    def within(self, length: int) -> "Candidates":
        """Those of the first `length` tokens."""
        kept = int(np.searchsorted(self.positions, length))
        return Candidates(self.positions[:kept], self.ids[:kept], self.p[:kept], self.z[:kept])

    @property
    def shares(self) -> NDArray[np.float32]:
        """(N, K) probabilities among the candidates."""
        return self.p / self.p.sum(-1, keepdims=True)


def text_key(input_ids: NDArray[np.int64]) -> str:
    """Of a text of (T,) tokens: what its candidates are found by."""
    return hashlib.sha256(input_ids.astype(np.int64).tobytes()).hexdigest()[:16]


def write_candidates(
    path: Path, found: Mapping[str, Candidates], settings: Mapping[str, Any]
) -> None:
    """By text key, those with any; the file exists only when complete.

    settings: what they were made with; `gamma` is the teacher's.
    """
    rows = [
        {"text": key, "positions": c.positions}
        | {name: getattr(c, name).reshape(-1) for name in ("ids", "p", "z")}
        for key, c in found.items()
        if len(c.positions)
    ]
    unfinished = path.with_suffix(".tmp")
    schema = SCHEMA.with_metadata({SETTINGS_KEY: json.dumps(settings).encode()})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), unfinished)
    os.replace(unfinished, path)


def is_written(path: Path, settings: Mapping[str, Any]) -> bool:
    """Raises ValueError naming a file that is broken, or made with another setting."""
    if not path.exists():
        return False
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
    check_same(path, _settings(schema), settings)
    return True


def read_candidates(folder: Path, gamma: float) -> dict[str, Candidates]:
    """By text key, their logits told in `gamma`.

    Raises ValueError where `folder` holds none, or of several numbers.
    """
    found: dict[str, Candidates] = {}
    for file in sorted(folder.glob("*.parquet")) if folder.is_dir() else [folder]:
        try:
            table = pq.read_table(file, schema=SCHEMA)
            theirs = float(_settings(pq.read_schema(file))["gamma"])
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise ValueError(f"{file}: holds no candidates: {error}") from error
        for row in table.to_pylist():
            shape = (len(row["positions"]), -1)
            z = logit_in_gamma(torch.tensor(row["z"], dtype=torch.float64), theirs, gamma)
            found[row["text"]] = Candidates(
                np.asarray(row["positions"], np.int64),
                np.asarray(row["ids"], np.int64).reshape(shape),
                np.asarray(row["p"], np.float32).reshape(shape),
                z.numpy().astype(np.float32).reshape(shape),
            )
    if not found:
        raise ValueError(f"{folder}: holds no candidates")
    if len({c.ids.shape[1] for c in found.values()}) != 1:
        raise ValueError(f"{folder}: expected positions with equally many candidates")
    return found


def _settings(schema: pa.Schema) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((schema.metadata or {}).get(SETTINGS_KEY, b"{}"))
    return settings


def count(found: Sequence[Candidates | None]) -> int:
    """Positions that have candidates."""
    return sum(len(c.positions) for c in found if c is not None)
