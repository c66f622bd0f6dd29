"""Trainings that were stopped go on with the same settings, and end as if they had not been."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import trainer.training.train
from tests.support.training import contents, run, toy_rows, write
from trainer.training.backbone import LoraShape, Tune
from trainer.training.steps import last_step
from trainer.training.value_trainer import ValueTrainer

TUNES: list[Tune] = ["full", "lora", "head"]


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


@pytest.mark.parametrize("tune", TUNES)
def test_a_stopped_run_ends_as_if_it_had_not_been(
    tune: Tune, base: Path, data: Path, tmp_path: Path, history: list[dict[str, Any]]
) -> None:
    run(data, tmp_path / "whole", base, tune=tune)
    history.clear()
    run_until(3, data, tmp_path / "out", base, tune=tune)
    assert last_step(tmp_path / "out" / "steps") == tmp_path / "out" / "steps" / "checkpoint-2"
    run(data, tmp_path / "out", base, tune=tune)
    assert len([entry for entry in history if "loss" in entry]) == 3  # it did go on from step 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_run_is_not_repeated(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(data, out, base)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    run(data, out, base)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert f"{out}: finished before" in capsys.readouterr().out
    for options in ({"resume": False}, {"seed": 1}):
        run(data, out, base, **options)
        assert min(path.stat().st_mtime_ns for path in out.iterdir()) > max(before.values())


def test_stopped_twice_and_before_the_first_save(base: Path, data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "whole", base)
    for step in (1, 4):
        run_until(step, data, tmp_path / "out", base)
    run(data, tmp_path / "out", base)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_step_that_was_not_written_whole_is_passed_over(tmp_path: Path) -> None:
    assert last_step(tmp_path) is None
    for step in (8, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (8, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last_step(tmp_path) == tmp_path / "checkpoint-10"


@pytest.fixture(scope="module")
def stopped(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "out"
    run_until(3, data, folder, base)
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 2e-3),
        ("max_steps", 9),
        ("tokens_per_step", 128),
        ("max_length", 60),
        ("warmup_steps", 1),
        ("num_layers", 1),
        ("gamma", 0.5),
        ("seed", 7),
        ("gae_lambda", 0.5),
        ("loss", "bce"),
        ("weighting", "trajectory"),
        ("batches", "grouped"),
        ("target", "length"),
        ("base_model", "org/other"),
        ("lora", LoraShape(rank=2, alpha=8)),
    ],
)
def test_a_setting_that_changed_is_named(
    name: str, value: Any, stopped: Path, base: Path, data: Path
) -> None:
    before = contents(stopped)
    with pytest.raises(ValueError, match=rf"^{name}: .* was made with .* resume it starts anew"):
        run(data, stopped, base, **{name: value})
    assert contents(stopped) == before


def test_another_way_of_tuning_is_named(stopped: Path, base: Path, data: Path) -> None:
    with pytest.raises(ValueError, match=r"^weights: .*'head', this run has 'full'"):
        run(data, stopped, base, tune="full")


def test_data_that_changed_are_named(stopped: Path, base: Path, tmp_path: Path) -> None:
    rows = toy_rows()
    rows[5]["completion_ids"][1] += 1
    with pytest.raises(ValueError, match=r"^data: .* was made with"):
        run(write(tmp_path / "toy.parquet", rows), stopped, base)


def test_another_backbone_is_named(stopped: Path, base: Path, data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    with pytest.raises(ValueError, match=r"^model: .* was made with"):
        run(data, stopped, other)


def test_without_resume_it_starts_anew(
    stopped: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(stopped, tmp_path / "out")
    run(data, out, base, seed=7, resume=False)
    run(data, tmp_path / "fresh", base, seed=7)
    assert contents(out) == contents(tmp_path / "fresh")
