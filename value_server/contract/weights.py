"""Whether two copies of a model have the same weights, from a few of their rows.

A quantised copy that was written back as an ordinary checkpoint has the name, the shapes and the
tokenizer of its original, and other weights: another model, whose texts have other lengths.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# The embedding and the lowest layer, as most decoders call them, whatever stands in front.
_READ = re.compile(r"(?:^|\.)(embed_tokens\.weight|layers\.0\..+)$")
_EMBEDDING = "embed_tokens.weight"
_TYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it


def weights_fingerprint(model: str) -> str:
    """Shape of the embedding and a hash of the first rows of some weights, in bfloat16, such as
    `49152x576-0123456789abcdef`: the same in any of the types that models are stored in.

    model: a folder, or a hub name that is in the local cache. Empty where there are no safetensors
    of a decoder whose weights have the usual names; nothing is downloaded.
    """
    found: dict[str, tuple[list[int], bytes]] = {}
    for file in _files(model):
        found.update(_rows(file))
    if _EMBEDDING not in found:
        return ""
    digest = hashlib.sha256()
    for name, (shape, row) in sorted(found.items()):
        digest.update(f"{name} {shape}\n".encode() + row)
    size = "x".join(map(str, found[_EMBEDDING][0]))
    return f"{size}-{digest.hexdigest()[:16]}"


def are_other_weights(ours: str, theirs: str) -> bool:
    """Whether two fingerprints are of one architecture with different weights; where one is not
    known, or they are models of different shapes, there is nothing to compare."""
    same_shape = ours.partition("-")[0] == theirs.partition("-")[0]
    return bool(ours and theirs) and same_shape and ours != theirs


def _files(model: str) -> list[Path]:
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (OSError, ValueError):  # not in the cache, or no name of the hub
            return []
    return sorted(folder.glob("*.safetensors"))


def _rows(file: Path) -> Iterator[tuple[str, tuple[list[int], bytes]]]:
    """(name, (shape, first row in bfloat16)) of the weights that are read; none of a wrong file."""
    with file.open("rb") as opened:
        try:
            (size,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(min(size, _LONGEST_HEADER)))
        except (struct.error, ValueError):
            return
        for full_name, facts in header.items():
            name = _READ.search(full_name)
            if name and facts["dtype"] in _TYPES and facts["shape"]:
                yield name[1], (facts["shape"], _first_row(opened, 8 + size, facts))


def _first_row(opened: BinaryIO, start: int, facts: dict[str, Any]) -> bytes:
    stored = np.dtype(_TYPES[facts["dtype"]])
    opened.seek(start + facts["data_offsets"][0])
    row = np.frombuffer(opened.read(stored.itemsize * facts["shape"][-1]), stored)
    if facts["dtype"] == "BF16":
        return row.tobytes()
    bits = row.astype("<f4").view("<u4")
    rounded = bits + 0x7FFF + (bits >> 16 & 1)  # to the nearest, ties to even
    return bytes((rounded >> 16).astype("<u2").tobytes())
