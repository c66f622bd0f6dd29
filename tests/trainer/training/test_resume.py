"""Trainings that were stopped go on with the same settings, and end as if they had not been."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trainer.training.examples
from tests.support.stopped import run_until
from tests.support.training import contents, run, toy_rows, write
from trainer.evaluation.baselines import fit_baselines
from trainer.training.backbone import LoraShape, Tune
from trainer.training.steps import last_step, open_steps
from trainer.training.training import Training


@pytest.mark.parametrize(("tune", "stops"), [("full", (3,)), ("head", (1, 4))])
def test_a_stopped_run_ends_as_if_it_had_not_been(
    tune: Tune,
    stops: tuple[int, ...],
    base: Path,
    data: Path,
    tmp_path: Path,
    history: list[dict[str, Any]],
) -> None:
    """Also twice, and before the first save; `lora` see tests/trainer/test_killed.py."""
    run(data, tmp_path / "whole", base, tune=tune)
    for step in stops:
        run_until(step, data, tmp_path / "out", base, tune=tune)
    last = last_step(tmp_path / "out" / "steps")
    assert last == tmp_path / "out" / "steps" / f"checkpoint-{stops[-1] // 2 * 2}"
    history.clear()
    run(data, tmp_path / "out", base, tune=tune)
    done = [entry for entry in history if "loss" in entry]
    assert len(done) == 5 - stops[-1] // 2 * 2  # it did go on from the last save
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_run_of_before_lookahead_goes_on_with_other_passes(
    base: Path, data: Path, tmp_path: Path, history: list[dict[str, Any]]
) -> None:
    """It knew neither of them; how many packs go at once changes nothing but rounding."""
    out = tmp_path / "out"
    run(data, tmp_path / "whole", base)
    run_until(3, data, out, base)
    settings = json.loads((out / "steps" / "settings.json").read_text())
    assert not {"lookahead_rank", "packs_per_pass"} & settings.keys()
    history.clear()
    run(data, out, base, packs_per_pass=3)
    assert len([entry for entry in history if "loss" in entry]) == 3
    heads = [load_file(f / "value_head.safetensors") for f in (out, tmp_path / "whole")]
    torch.testing.assert_close(*heads, rtol=1e-4, atol=1e-5)


def test_a_finished_run_is_not_repeated(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(data, out, base, max_steps=1)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    run(data, out, base, max_steps=1)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert f"{out}: finished before" in capsys.readouterr().out


def test_a_step_that_was_not_written_whole_is_passed_over(tmp_path: Path) -> None:
    assert last_step(tmp_path) is None
    for step in (8, 10, 12, 14):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step, state in ((8, "{}"), (10, "{}"), (12, '{"global_st')):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
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
        ("scheduler", "linear"),
        ("weight_decay", 0.1),
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
    with pytest.raises(
        ValueError, match=rf"^{name}: .* was made with .*; --no-resume starts anew$"
    ):
        run(data, stopped, base, **{name: value})
    assert contents(stopped) == before


@pytest.mark.parametrize("rest", [0, 0.5])
@pytest.mark.parametrize(
    "name", ["settings.json", "checkpoint-2/trained.safetensors", "checkpoint-2/optimizer.pt"]
)
def test_what_is_damaged_is_named(
    name: str, rest: float, stopped: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(stopped, tmp_path / "out")
    damaged = out / "steps" / name
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(rest * len(content))])
    named = damaged if name == "settings.json" else damaged.parent
    with pytest.raises(ValueError, match=rf"^{named}: .+; --no-resume starts anew$"):
        run(data, out, base)
    assert damaged.exists()


def test_killed_while_its_steps_are_deleted(
    stopped: Path, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has finished, and what is left of them is not gone on from."""
    out = shutil.copytree(stopped, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.training.steps.shutil.rmtree", lambda *_, **__: None)
        run(data, out, base)
    (out / "steps" / "settings.json").unlink()
    capsys.readouterr()
    run(data, out, base)
    assert f"{out}: finished before" in capsys.readouterr().out
    assert not (out / "steps").exists()


def test_steps_of_unknown_settings_are_not_gone_on_from(tmp_path: Path) -> None:
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    state.parent.mkdir()
    state.write_text("{}")
    with pytest.raises(
        ValueError, match=r"^seed: .* was made with None, this run has 3; --no-resume"
    ):
        open_steps(tmp_path, {"seed": 3}, resume=True)
    assert state.exists()
    assert open_steps(tmp_path, {"seed": 3}, resume=False) is None


def test_another_way_of_tuning_is_named(stopped: Path, base: Path, data: Path) -> None:
    with pytest.raises(ValueError, match=r"^weights: .*'head', this run has 'full'"):
        run(data, stopped, base, tune="full")


def test_what_was_computed_may_differ_by_rounding(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with another number of threads: of a run that was stopped, and of a finished one. The bug
    guarded against: a baseline that differed in its 14th digit was taken for another setting."""
    with pytest.MonkeyPatch.context() as patch:
        elsewhere(patch)
        run_until(3, data, tmp_path / "out", base)
        run(data, tmp_path / "finished", base)
    run(data, tmp_path / "out", base)
    run(data, tmp_path / "whole", base)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    capsys.readouterr()
    run(data, tmp_path / "finished", base)
    told = f"{tmp_path / 'finished'}: finished before; --no-resume starts anew\n"
    assert capsys.readouterr().out == told


def elsewhere(patch: pytest.MonkeyPatch) -> None:
    """What is computed of the data differs in its last digits."""
    discount = Training.discount

    def baselines(*args: Any) -> dict[str, Any]:
        return {
            name: {part: [w * (1 + 1e-13) + 1e-15 for w in own] for part, own in parts.items()}
            for name, parts in fit_baselines(*args).items()
        }

    patch.setattr(trainer.training.examples, "fit_baselines", baselines)
    patch.setattr(Training, "discount", lambda *args: discount(*args) * (1 + 1e-15))


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
    """Also where a run has finished."""
    out = shutil.copytree(stopped, tmp_path / "out")
    run(data, out, base, seed=7, max_steps=2, resume=False)
    finished = contents(out)
    run(data, tmp_path / "fresh", base, seed=7, max_steps=2)
    assert finished == contents(tmp_path / "fresh")
    made = (out / "config.json").stat().st_mtime_ns
    run(data, out, base, seed=7, max_steps=2, resume=False)
    assert (out / "config.json").stat().st_mtime_ns > made
    assert contents(out) == finished


@pytest.fixture(scope="module")
def finished(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    run(data, folder, base, max_steps=1)
    return folder


@pytest.mark.parametrize(
    ("name", "value"), [("max_steps", 2), ("seed", 7), ("gamma", 0.5), ("loss", "bce")]
)
def test_a_finished_run_with_other_settings_is_not_written_over(
    name: str, value: Any, finished: Path, base: Path, data: Path
) -> None:
    before = contents(finished)
    with pytest.raises(ValueError, match=rf"^{name}: .* was made with .*--no-resume, starts anew"):
        run(data, finished, base, **{"max_steps": 1, name: value})
    assert contents(finished) == before


def test_nor_one_of_other_data_or_what_is_no_value_model(
    finished: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    rows = toy_rows()
    rows[5]["completion_ids"][1] += 1
    other = write(tmp_path / data.name, rows)
    with pytest.raises(ValueError, match=r"^output: .* of other data, model or options; "):
        run(other, finished, base, max_steps=1)
    model = shutil.copytree(base, tmp_path / "model")
    with pytest.raises(ValueError, match=r"^output: .*not a LenVM checkpoint; .* starts anew"):
        run(data, model, base, max_steps=1)
