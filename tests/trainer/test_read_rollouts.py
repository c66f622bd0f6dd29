"""Files of rollouts, and what is refused of them by name."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data import COLUMNS, read_rollouts

ROW = {
    "prompt_id": "7",
    "domain": "news",
    "prompt_ids": [1, 2],
    "completion_ids": [3, 4, 5],
    "finish_reason": "stop",
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def test_read_one_file(tmp_path: Path) -> None:
    cut = ROW | {"finish_reason": "length", "domain": None}
    first, second = read_rollouts(write(tmp_path / "a.parquet", ROW, cut))
    assert (first.prompt_id, first.domain, first.finished) == ("7", "news", True)
    assert first.prompt_ids.tolist() == [1, 2]
    assert first.completion_ids.tolist() == [3, 4, 5]
    assert (second.domain, second.finished) == ("", False)
    assert first.prompt == ""
    (told,) = read_rollouts(write(tmp_path / "b.parquet", ROW | {"prompt": "Why?"}))
    assert told.prompt == "Why?"


@pytest.mark.parametrize("reason", ["length", "abort", "", None])
def test_only_a_stop_is_a_finished_completion(reason: str | None, tmp_path: Path) -> None:
    row = ROW | {"finish_reason": reason}
    assert [r.finished for r in read_rollouts(write(tmp_path / "a.parquet", ROW, row))] == [
        True,
        False,
    ]


def test_read_a_folder_in_the_order_of_its_shards(tmp_path: Path) -> None:
    write(tmp_path / "part-1.parquet", ROW | {"prompt_id": "b"})
    write(tmp_path / "part-0.parquet", ROW | {"prompt_id": "a"})
    (tmp_path / "part-2.tmp").write_text("unfinished")
    assert [r.prompt_id for r in read_rollouts(tmp_path)] == ["a", "b"]


def test_rows_without_tokens_are_left_out(tmp_path: Path) -> None:
    empty: list[dict[str, Any]] = [
        ROW | {"completion_ids": []},
        ROW | {"prompt_ids": []},
        ROW | {"prompt_ids": None},
    ]
    assert len(read_rollouts(write(tmp_path / "a.parquet", ROW, *empty))) == 1


@pytest.mark.parametrize("column", COLUMNS)
def test_missing_column_is_named(column: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {k: v for k, v in ROW.items() if k != column})
    with pytest.raises(ValueError, match=rf"a\.parquet: column '{column}' is missing"):
        read_rollouts(path)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"PAR1" + bytes(50) + b"PAR1"], ids=["empty", "json", "no footer"]
)
def test_not_parquet(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable Parquet file"):
        read_rollouts(tmp_path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing: no such file or folder"):
        read_rollouts(tmp_path / "nothing")


def test_nothing_in_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: no rollouts"):
        read_rollouts(tmp_path)


def test_damaged_shard(tmp_path: Path) -> None:
    """A file whose end is whole but whose data was overwritten."""
    path = write(tmp_path / "a.parquet", *[ROW] * 500)
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable Parquet file"):
        read_rollouts(path)


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_token_ids_of_any_list_and_width(kind: Any, tmp_path: Path) -> None:
    table = pa.Table.from_pylist([ROW])
    for column in ("prompt_ids", "completion_ids"):
        place = table.column_names.index(column)
        table = table.set_column(place, column, table[column].cast(kind(pa.int16())))
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_rollouts(tmp_path)[0].completion_ids.tolist() == [3, 4, 5]


@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids"])
@pytest.mark.parametrize("value", [["a"], "ab", 7, [0.5]])
def test_column_of_another_type(column: str, value: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ROW | {column: value})
    with pytest.raises(ValueError, match=rf"a\.parquet: column '{column}' holds .*, not token ids"):
        read_rollouts(path)
