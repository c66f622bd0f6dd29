"""A backbone and the toy task, for all tests that train; nobody writes to them."""

from pathlib import Path
from typing import Any

import pytest

import trainer.training.train
from tests.support.tiny_llm import tiny_llm
from tests.support.training import toy_rows, write
from trainer.training.value_trainer import ValueTrainer


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llm(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "toy.parquet", toy_rows())


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The log of the last run."""
    log: list[dict[str, Any]] = []

    class Recorded(ValueTrainer):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            log.append(dict(logs))
            super().log(logs, *args, **kwargs)

    monkeypatch.setattr(trainer.training.train, "ValueTrainer", Recorded)
    return log
