"""Files of rollouts: the tokenizer that their ids are of, several of them as one.

A file is Parquet with the columns of columns.py. In its metadata TOKENIZER_KEY tells whose ids it
holds.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from transformers import AutoTokenizer

from trainer.checks import check
from trainer.columns import ID_COLUMNS, columns_of, schema_of
from trainer.data import Rollout
from trainer.digests import seen
from trainer.pictures import PicturesOf
from value_server.contract.checkpoint import tokenizer_fingerprint

ROWS_AT_ONCE = 512
TOKENIZER_KEY = b"lenvm.tokenizer"
ENGINE, TEXT = "engine", "text"  # token_source: ids as sampled, or a text that was encoded


@dataclass(frozen=True, slots=True)
class TokenizerOf:
    """Whose token ids these are. model: for messages; fingerprint: as in a checkpoint."""

    model: str
    fingerprint: str

    @classmethod
    def load(cls, model: str) -> "TokenizerOf":
        """Of a hub name or folder."""
        return cls(model, tokenizer_fingerprint(AutoTokenizer.from_pretrained(model)))

    def metadata(self) -> dict[bytes, bytes]:
        """For a file's schema."""
        return {TOKENIZER_KEY: json.dumps(asdict(self)).encode()}


@dataclass(frozen=True, slots=True)
class Source:
    """Rollouts of one origin. weight: what a token of theirs counts for in training."""

    path: Path
    weight: float = 1.0

    @property
    def name(self) -> str:
        """For facts: without the folder it lies in."""
        return self.path.name if self.weight == 1 else f"{self.path.name}={self.weight:g}"

    def files(self) -> list[Path]:
        """The file, or the shards of the folder in order. Raises ValueError where it has none."""
        if not self.path.is_dir():
            return [self.path]
        if not (found := sorted(self.path.glob("*.parquet"))):
            raise ValueError(f"{self.path}: no rollouts")
        return found


def sources_of(rollouts: Path) -> list[Source]:
    """A path, path=weight, or several of these between commas, as a.parquet=2,b.parquet.

    Raises ValueError naming a weight that is none.
    """
    if rollouts.exists():
        return [Source(rollouts)]
    return [_source_of(part) for part in str(rollouts).split(",")]


def _source_of(part: str) -> Source:
    path, equals, weight = part.rpartition("=")
    check(bool(part), "rollouts", part, "a path; one comma too many")
    if Path(part).exists() or not equals:
        return Source(Path(part))
    try:
        source = Source(Path(path), float(weight))
    except ValueError:
        source = Source(Path(path), 0)
    fits = bool(path) and 0 < source.weight < float("inf")
    check(fits, "rollouts", part, "a path, or path=weight with a weight above 0")
    return source


def name_of(rollouts: Path) -> str:
    """What facts call them."""
    return ",".join(source.name for source in sources_of(rollouts))


def files_of(rollouts: Path) -> list[Path]:
    """All files of all sources."""
    return [file for source in sources_of(rollouts) for file in source.files()]


def check_tokenizer(path: Path, ours: TokenizerOf) -> None:
    """Raises ValueError naming both tokenizers where a file of `path` has ids of another one.

    Files that do not tell are accepted, with a line on stderr.
    """
    silent = []
    for file in files_of(path):
        found = (schema_of(file).metadata or {}).get(TOKENIZER_KEY)
        if found is None:
            silent.append(file)
            continue
        theirs = TokenizerOf(**json.loads(found))
        if theirs.fingerprint != ours.fingerprint:
            raise ValueError(
                f"rollouts: {file} has token ids of {theirs.model}'s tokenizer "
                f"({theirs.fingerprint[:12]}…), that of {ours.model} is another "
                f"({ours.fingerprint[:12]}…)"
            )
    if silent:
        print(
            f"warning: {path}: {len(silent)} of its files tell no tokenizer; it is taken to be "
            f"that of {ours.model}",
            file=sys.stderr,
        )


def check_ids(rollouts: Sequence[Rollout], size: int, model: object) -> None:
    """Raises ValueError where a model with a vocabulary of `size` does not know all tokens."""
    parts = (ids for r in rollouts for ids in (r.prompt_ids, r.completion_ids))
    largest = max((int(ids.max()) for ids in parts), default=0)
    check(largest < size, "token id", largest, f"below {model}'s vocab_size {size}")


def read_rollouts(path: Path, tokenizer: TokenizerOf | None = None) -> list[Rollout]:
    """All rollouts of one or several sources (`sources_of`), which must be of `tokenizer`.

    A text that is in several files counts as often as in the one that has it most. Equal prompts
    have one id, that of the first, and different prompts different ones. Raises ValueError naming
    the file and what it lacks.
    """
    if tokenizer:
        check_tokenizer(path, tokenizer)
    kept: Counter[bytes] = Counter()
    prompts, pictures = _Prompts(), PicturesOf()
    rollouts = []
    weighted = [(file, s.weight) for s in sources_of(path) for file in s.files()]
    for file, weight in weighted:
        found: Counter[bytes] = Counter()
        for rollout in _read_file(file, pictures):
            prompt = _digest(rollout.prompt_ids, seen(rollout))
            text = prompt + _digest(rollout.completion_ids) + bytes([rollout.finished])
            found[text] += 1
            if found[text] > kept[text]:
                kept[text] += 1
                rollouts.append(prompts.shared(rollout, prompt, weight))
    if not rollouts:
        raise ValueError(f"{path}: no rollouts")
    return _with_texts(rollouts)


def _with_texts(rollouts: list[Rollout]) -> list[Rollout]:
    """Each with the text of its prompt, where any of them has it."""
    texts: dict[str, str] = {}
    for rollout in rollouts:
        if rollout.prompt:
            texts.setdefault(rollout.prompt_id, rollout.prompt)
    return [
        replace(rollout, prompt=texts[rollout.prompt_id])
        if not rollout.prompt and rollout.prompt_id in texts
        else rollout
        for rollout in rollouts
    ]


class _Prompts:
    """A prompt, an id: the first that it came with, unless another prompt had that before.

    So for its conversation, that the split goes by, its text and its token ids, which all its
    completions then share.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, dict[str, Any]] = {}
        self._owners: dict[str, bytes] = {}

    def shared(self, rollout: Rollout, prompt: bytes, weight: float) -> Rollout:
        if prompt not in self._known:
            given = rollout.prompt_id
            free = self._owners.setdefault(given, prompt) == prompt
            self._known[prompt] = {
                "prompt_id": given if free else f"{given}-{prompt.hex()}",
                "conversation": rollout.conversation,
                "prompt": rollout.prompt,
                "prompt_ids": rollout.prompt_ids.copy(),
            }
        own = self._known[prompt]
        return replace(rollout, weight=weight, **own | {"prompt": own["prompt"] or rollout.prompt})


def _digest(ids: NDArray[np.integer[Any]], pictures: bytes = b"") -> bytes:
    return hashlib.sha256(ids.astype(np.int64).tobytes() + pictures).digest()[:16]


def _read_file(file: Path, pictures: PicturesOf) -> Iterator[Rollout]:
    columns = columns_of(file)
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=columns):
                yield from _rollouts_of(file, batch, pictures)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{file}: not a readable Parquet file: {error}") from error


def _rollouts_of(file: Path, batch: pa.RecordBatch, pictures: PicturesOf) -> Iterator[Rollout]:
    """Those that have tokens; their ids are parts of Arrow's own buffers."""
    prompts, completions = (_lists(file, name, batch[name]) for name in ID_COLUMNS)
    rows = batch.drop_columns(ID_COLUMNS).to_pylist()
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        own = pictures.take(file, row)
        if len(prompt) and len(completion):
            yield Rollout(
                str(row["prompt_id"]),
                sys.intern(_text(row["domain"])),
                prompt,
                completion,
                row["finish_reason"] == "stop",
                conversation=_text(row.get("conversation")),
                prompt=_text(row.get("prompt")),
                pictures=own,
            )


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _lists(file: Path, name: str, column: pa.Array) -> list[NDArray[np.int32]]:
    """Of each row its ids, none where it has none. Raises ValueError for a number that is none."""
    lists = column.cast(pa.large_list(pa.int32()))
    ids, ends = lists.values.to_numpy(), lists.offsets.to_numpy()
    least = ids.min(initial=0)
    check(least >= 0, f"{file}: {name}", int(least), "a token id, at least 0")
    return [ids[start:end] for start, end in pairwise(ends.tolist())]
