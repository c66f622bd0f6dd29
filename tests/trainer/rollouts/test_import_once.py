"""A conversation is logged with every request, in one log or in several; its turns count once."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.support.logs import IDS, REPLY, REQUEST, USER, Import, answer, figures, write
from tests.support.tiny import tiny_tokenizer
from trainer.rollouts.import_logs import import_logs


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [tiny_tokenizer().decode(row["completion_ids"][:-1]) for row in rows]


def test_a_conversation_that_is_logged_with_each_request(imported: Import) -> None:
    """Each turn once, in whatever order; an answer that is logged twice once."""
    more = [USER, REPLY, {"role": "user", "content": "And?"}]
    first = {"request": REQUEST, "response": answer() | {"id": "a"}}
    second = {"request": {"messages": more}, "response": answer("No") | {"id": "b"}}
    for lines in ([first, second], [second, first], [second], [first, second, second]):
        assert sorted(texts(imported(*lines))) == ["Hello", "No"]
    assert texts(imported(second, turns="last")) == ["No"]


def test_samples_that_are_alike_are_kept(imported: Import) -> None:
    """As many as were given: lengths that are common weigh more."""
    lines = [{"request": REQUEST, "response": answer() | {"id": str(i)}} for i in range(3)]
    assert texts(imported(*lines)) == ["Hello"] * 3


MORE = [USER, REPLY, {"role": "user", "content": "And?"}]
CUT = {"request": REQUEST, "response": answer(**IDS) | {"id": "a"}}
CUT["response"]["choices"][0]["finish_reason"] = "length"
LATER = {"request": {"messages": MORE}, "response": answer("No") | {"id": "b"}}


def told(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return sorted(
        (tiny_tokenizer().decode(row["completion_ids"]), row["finish_reason"], row["token_source"])
        for row in rows
    )


ONCE = [("Hello<|end|>", "length", "engine"), ("No<|end|>", "stop", "text")]


def test_an_answer_with_ids_is_not_taken_from_messages(imported: Import) -> None:
    for lines in ([CUT, LATER], [LATER, CUT]):
        assert told(imported(*lines)) == ONCE


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_an_answer_of_another_log(names: tuple[str, str], base: Path, tmp_path: Path) -> None:
    """Whichever log is read first, and where only one is made again."""
    first, second = (tmp_path / f"{name}.jsonl" for name in names)
    write(first, CUT)
    write(second, LATER)
    import_logs(tmp_path, tmp_path / "out", model=str(base))
    assert told(pq.read_table(tmp_path / "out").to_pylist()) == ONCE
    (tmp_path / "out" / f"{names[1]}.parquet").unlink()
    import_logs(tmp_path, tmp_path / "out", model=str(base))
    assert told(pq.read_table(tmp_path / "out").to_pylist()) == ONCE


def test_an_answer_of_another_log_beside_a_bad_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.jsonl", LATER)
    write(tmp_path / "b.jsonl", "{", CUT)
    import_logs(tmp_path, tmp_path / "out", model=str(base), skip_bad=True)
    assert told(pq.read_table(tmp_path / "out").to_pylist()) == ONCE
    assert figures(capsys.readouterr().out)["bad"] == 1
