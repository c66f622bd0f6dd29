"""The file of predictions that a stopped evaluation goes on from."""

from pathlib import Path

import pytest

from trainer.evaluation.journal import close_journal
from trainer.rows import Rows


def test_a_closed_journal_is_gone_and_its_file_closed(tmp_path: Path) -> None:
    journal = Rows(tmp_path / "predictions.jsonl")
    journal.add({"key": "0"})
    close_journal(journal)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="closed file"):
        journal.add({"key": "1"})


@pytest.mark.parametrize("line", ['{"key": "0", "log', "{}", "\0\0"])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    """One in the middle: the last may have been cut off."""
    path = tmp_path / "predictions.jsonl"
    path.write_text(f'{{"key": "1"}}\n{line}\n{{"key": "2"}}\n')
    with pytest.raises(ValueError, match=rf"^{path}: line 2: "):
        Rows(path)
