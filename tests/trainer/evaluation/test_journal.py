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
