"""Files of rollouts, and what is refused of them by name."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.columns import COLUMNS
from trainer.data import split
from trainer.rollout_files import TokenizerOf, name_of, read_rollouts

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
    write(tmp_path / "part-1.parquet", ROW | {"prompt_id": "b", "prompt_ids": [9]})
    write(tmp_path / "part-0.parquet", ROW | {"prompt_id": "a"})
    (tmp_path / "part-2.tmp").write_text("unfinished")
    assert [r.prompt_id for r in read_rollouts(tmp_path)] == ["a", "b"]


def test_a_text_of_several_files_counts_as_in_the_one_that_has_it_most(tmp_path: Path) -> None:
    """The bug guarded against: a folder merged of two, with a shard in both. Samples of one file
    that are alike are samples."""
    other = ROW | {"completion_ids": [6]}
    write(tmp_path / "a.parquet", ROW, ROW, other)
    write(tmp_path / "b.parquet", ROW, ROW, ROW, ROW | {"finish_reason": "length"})
    found = read_rollouts(tmp_path)
    assert [(len(r.completion_ids), r.finished) for r in found] == [
        *[(3, True)] * 2, (1, True), (3, True), (3, False)
    ]  # fmt: skip


def test_ids_of_merged_files_do_not_collide(tmp_path: Path) -> None:
    """Both files call their prompts 0 and 1; prompt 1 of the second is prompt 0 of the first, so
    that the split must keep them together."""
    own = [ROW | {"prompt_id": str(i), "prompt_ids": [i], "completion_ids": [i]} for i in range(2)]
    write(tmp_path / "a.parquet", *own)
    write(
        tmp_path / "b.parquet",
        ROW | {"prompt_id": "0", "prompt_ids": [7], "completion_ids": [8]},
        ROW | {"prompt_id": "1", "prompt_ids": [0], "completion_ids": [9]},
    )
    first, second, third, fourth = (r.prompt_id for r in read_rollouts(tmp_path))
    assert (first, second, fourth) == ("0", "1", "0")
    assert third not in ("0", "1")
    alone = read_rollouts(tmp_path / "b.parquet")
    assert [r.prompt_id for r in alone] == ["0", "1"]


def test_turns_of_a_conversation_are_not_split(tmp_path: Path) -> None:
    rows = [
        ROW | {"prompt_id": f"{c}-{n}", "prompt_ids": [c, n], "conversation": str(c)}
        for c in range(20)
        for n in range(3)
    ]
    known, held_out = split(read_rollouts(write(tmp_path / "a.parquet", *rows)), 0.5)
    assert len(known) + len(held_out) == 60
    assert not {r.conversation for r in known} & {r.conversation for r in held_out}
    assert held_out


def tell(path: Path, tokenizer: TokenizerOf) -> Path:
    table = pa.Table.from_pylist([ROW]).replace_schema_metadata(tokenizer.metadata())
    pq.write_table(table, path)
    return path


def test_another_tokenizers_rollouts_are_refused(tmp_path: Path) -> None:
    ours, theirs = TokenizerOf("org/ours", "a" * 64), TokenizerOf("org/theirs", "b" * 64)
    path = tell(tmp_path / "a.parquet", theirs)
    assert len(read_rollouts(path)) == len(read_rollouts(path, theirs)) == 1
    message = (
        r"^rollouts: .*a\.parquet .* org/theirs's .*\(bbbbbbbbbbbb…\).* org/ours .*\(aaaaaaaaaaaa…"
    )
    with pytest.raises(ValueError, match=message):
        read_rollouts(tmp_path, ours)


def test_files_that_tell_no_tokenizer_are_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = TokenizerOf("org/ours", "a" * 64)
    tell(tmp_path / "a.parquet", ours)
    read_rollouts(tmp_path, ours)
    assert capsys.readouterr().err == ""
    write(tmp_path / "b.parquet", ROW)
    read_rollouts(tmp_path, ours)
    assert "warning: " in (told := capsys.readouterr().err)
    assert "1 of its files tell no tokenizer; it is taken to be that of org/ours" in told


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
@pytest.mark.parametrize("value", [["a"], "ab", 7, [0.5], {"ids": 1}, {"ids": [1]}, [{"id": 1}]])
def test_column_of_another_type(column: str, value: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ROW | {column: value})
    with pytest.raises(ValueError, match=rf"a\.parquet: column '{column}' holds .*, not token ids"):
        read_rollouts(path)


@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids"])
def test_a_number_that_is_no_token_id_is_named(column: str, tmp_path: Path) -> None:
    """As -100, which marks tokens without a loss elsewhere."""
    path = write(tmp_path / "a.parquet", ROW, ROW | {column: [1, -100]})
    with pytest.raises(ValueError, match=rf"a\.parquet: {column}: -100, must be a token id"):
        read_rollouts(path)


def test_several_sources_have_weights(tmp_path: Path) -> None:
    """Read as one: what both have counts as in the first, and ids do not collide."""
    (tmp_path / "b").mkdir()
    (tmp_path / "day=2026").mkdir()
    one, two, both = ROW | {"prompt_ids": [9]}, ROW | {"prompt_ids": [8]}, ROW
    write(tmp_path / "a.parquet", one, both)
    write(tmp_path / "b" / "x.parquet", two, both)
    write(tmp_path / "day=2026" / "y.parquet", ROW | {"prompt_ids": [7]})
    together = Path(f"{tmp_path}/a.parquet=2,{tmp_path}/b/=0.5,{tmp_path}/day=2026")
    found = read_rollouts(together)
    assert [(r.prompt_ids[0], r.weight) for r in found] == [(9, 2), (1, 2), (8, 0.5), (7, 1)]
    assert len({r.prompt_id for r in found}) == 4
    assert name_of(together) == "a.parquet=2,b=0.5,day=2026"
    assert [r.weight for r in read_rollouts(tmp_path / "a.parquet")] == [1, 1]
    ours, theirs = TokenizerOf("org/ours", "a" * 64), TokenizerOf("org/theirs", "b" * 64)
    tell(tmp_path / "c.parquet", theirs)
    with pytest.raises(ValueError, match=r"^rollouts: .*c\.parquet has token ids of org/theirs"):
        read_rollouts(Path(f"{tmp_path}/a.parquet=2,{tmp_path}/c.parquet"), ours)


def test_a_comma_too_many_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug guarded against: an empty path is the current folder."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.parquet", ROW)
    with pytest.raises(ValueError, match=r"^rollouts: '', must be a path"):
        read_rollouts(Path("a.parquet=2,"))


def test_a_source_that_has_none_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROW)
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"b: no rollouts$"):
        read_rollouts(Path(f"{tmp_path}/a.parquet=2,{tmp_path}/b"))


def test_a_prompts_text_is_that_of_any_file_that_has_it(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROW)
    told = [ROW | {"prompt": "Why?", "completion_ids": [i]} for i in range(2)]
    write(tmp_path / "b.parquet", *told, ROW | {"prompt_ids": [9], "prompt": ""})
    assert [r.prompt for r in read_rollouts(tmp_path)] == ["Why?"] * 3 + [""]


def test_a_domain_may_be_a_number(tmp_path: Path) -> None:
    (found,) = read_rollouts(write(tmp_path / "a.parquet", ROW | {"domain": 7}))
    assert found.domain == "7"


@pytest.mark.parametrize("part", ["b=0", "b=-1", "b=two", "b=", "b=nan", "b=inf", "=2"])
def test_a_weight_that_is_none_is_named(part: str, tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROW)
    message = rf"^rollouts: '{part}', must be a path, or path=weight with a weight above 0$"
    with pytest.raises(ValueError, match=message):
        read_rollouts(Path(f"{tmp_path}/a.parquet=2,{part}"))


def test_a_source_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROW)
    with pytest.raises(ValueError, match=r"^nothing: no such file or folder"):
        read_rollouts(Path(f"{tmp_path}/a.parquet,nothing=2"))


@pytest.mark.parametrize("column", ["prompt_id", "domain", "finish_reason", "prompt"])
@pytest.mark.parametrize("value", [{"a": 1}, ["a"]])
def test_column_that_is_no_text(column: str, value: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ROW | {column: value})
    kind = "struct<a: int64>" if isinstance(value, dict) else "list<element: string>"
    with pytest.raises(ValueError, match=rf"a\.parquet: column '{column}' holds {kind}, not text$"):
        read_rollouts(path)


def test_names_that_are_numbers(tmp_path: Path) -> None:
    (found,) = read_rollouts(write(tmp_path / "a.parquet", ROW | {"prompt_id": 0, "domain": 0}))
    assert (found.prompt_id, found.domain) == ("0", "0")


def test_columns_of_nothing(tmp_path: Path) -> None:
    """As pyarrow writes those of rows that have none."""
    empty = {"prompt": None, "conversation": None, "pictures": None, "picture_bytes": None}
    (found,) = read_rollouts(write(tmp_path / "a.parquet", ROW | empty))
    assert (found.prompt, found.conversation, found.pictures) == ("", "", ())
