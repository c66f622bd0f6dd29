"""Trainings that end amid a step, in this process."""

from typing import Any

import pytest

import trainer.training.train
from tests.support.training import run
from trainer.training.value_trainer import ValueTrainer


class KilledError(Exception):
    pass


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run ends amid the step after `step`."""

    class Stopped(ValueTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == step:
                raise KilledError
            return super().compute_loss(*args, **kwargs)

    monkeypatch.setattr(trainer.training.train, "ValueTrainer", Stopped)


def run_until(step: int, *args: Any, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(KilledError):
            run(*args, **options)
