"""The columns of a file of rollouts: which it must have, and what they hold.

Those of pictures are told in pictures.py.
"""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from trainer.pictures import BYTES, FIELDS, PICTURES

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("domain", pa.string()),
        ("prompt", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("conversation", pa.string()),
        ("token_source", pa.string()),
        *FIELDS,
    ]
)
COLUMNS = ("prompt_id", "domain", "prompt_ids", "completion_ids", "finish_reason")
OPTIONAL = ("conversation", "prompt", PICTURES, BYTES)
ID_COLUMNS = ["prompt_ids", "completion_ids"]
# What the columns of lists hold; the others are text.
LISTS: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    **dict.fromkeys(ID_COLUMNS, (types.is_integer, "token ids")),
    PICTURES: (lambda kind: not types.is_nested(kind), "lists of digests"),
    BYTES: (lambda kind: kind in (pa.binary(), pa.large_binary(), pa.null()), "lists of bytes"),
}


def schema_of(file: Path) -> pa.Schema:
    """Raises ValueError where it is no Parquet file."""
    try:
        return pq.read_schema(file)
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file or folder") from error
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{file}: not a readable Parquet file: {error}") from error


def columns_of(file: Path) -> list[str]:
    """Those to read. Raises ValueError naming one that is missing, or that holds something else."""
    schema = schema_of(file)
    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise ValueError(f"{file}: column {missing[0]!r} is missing, it has {schema.names}")
    columns = [*COLUMNS, *(name for name in OPTIONAL if name in schema.names)]
    for name in columns:
        kind = schema.field(name).type
        is_item, rule = LISTS.get(name, (None, "text"))
        fits = _are_lists(kind) and is_item(kind.value_type) if is_item else _is_text(kind)
        is_empty = types.is_null(kind) and name in OPTIONAL  # as written of rows that have none
        if not fits and not is_empty:
            raise ValueError(f"{file}: column {name!r} holds {kind}, not {rule}")
    return columns


def _are_lists(kind: pa.DataType) -> bool:
    kinds = (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )
    return any(own(kind) for own in kinds)


def _is_text(kind: pa.DataType) -> bool:
    """Also numbers, which names of prompts may be, and no column of lists or structs."""
    return not types.is_nested(kind)
