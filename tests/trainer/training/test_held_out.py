"""Looks at the held-out prompts while training runs: what they see, keep and end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.stopped import KilledError, run_until
from tests.support.training import contents, row, run, toy_rows, training, write
from trainer.data import make_example
from value_server.contract.checkpoint import read_config
from value_server.contract.values import value_from_length
from value_server.model.value_model import ValueModel

WATCHED: dict[str, Any] = {"holdout": 0.4, "eval_steps": 2, "packs_per_pass": 2}


def naive_loss(checkpoint: Path, data: Path, base: Path) -> float:
    """Text by text: the mean over all labelled tokens of the held-out prompts."""
    model = ValueModel.load(checkpoint, str(base))
    errors = []
    for text in training(base, **WATCHED).parts(data)[1]:
        example = make_example(text, 64)
        known = np.flatnonzero(example.labels > 0)
        with torch.inference_mode():
            u = model(torch.from_numpy(example.input_ids)[None])[0].sigmoid()
        target = value_from_length(torch.from_numpy(example.labels), model.lenvm.gamma)
        errors.append((u - target)[known].square())
    return float(torch.cat(errors).mean())


def looks(history: list[dict[str, Any]]) -> list[float]:
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry]


def test_the_best_weights_are_kept(
    base: Path, data: Path, tmp_path: Path, history: list[dict[str, Any]]
) -> None:
    """Packs differ in size, and a row of a pass is padding: their mean would be another."""
    out = tmp_path / "out"
    run(data, out, base, **WATCHED, learning_rate=0.1, max_steps=9, tune="full")
    seen = looks(history)
    assert len(seen) == 5  # after 2, 4, 6, 8 and at the end
    facts = read_config(out).training
    best = int(np.argmin(seen))
    assert best < 4, seen  # or the test shows nothing
    assert facts["best_step"] == 2 * (best + 1)
    assert facts["held_out_loss"] == seen[best] == pytest.approx(naive_loss(out, data, base))
    assert "| best_step | " in (out / "README.md").read_text()
    assert not (out / "steps").exists()


def test_looking_changes_no_step(
    base: Path, data: Path, tmp_path: Path, history: list[dict[str, Any]]
) -> None:
    """The bug guarded against: a look draws from the random state that orders the packs."""
    losses = []
    for name, eval_steps in (("blind", None), ("watched", 2)):
        history.clear()
        run(data, tmp_path / name, base, holdout=0.4, eval_steps=eval_steps, max_steps=12)
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("stop", [3, 7])
def test_a_stopped_run_keeps_its_best(base: Path, data: Path, tmp_path: Path, stop: int) -> None:
    options = WATCHED | {"learning_rate": 0.1, "max_steps": 9, "tune": "full"}
    run(data, tmp_path / "whole", base, **options)
    run_until(stop, data, tmp_path / "out", base, **options)
    run(data, tmp_path / "out", base, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_it_ends_where_nothing_gets_better(base: Path, data: Path, tmp_path: Path) -> None:
    """Steps too small for float32: the first look is the best, and two more are patient. Stopped
    after the second, it does not begin to count anew."""
    options = WATCHED | {"learning_rate": 1e-12, "eval_steps": 1, "patience": 2, "max_steps": 9}
    run(data, tmp_path / "whole", base, **options)
    facts = read_config(tmp_path / "whole").training
    assert (facts["best_step"], len(facts["loss_curve"])) == (1, 3)
    run_until(2, data, tmp_path / "out", base, **options)
    run(data, tmp_path / "out", base, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


PATIENT = WATCHED | {"learning_rate": 1e-12, "eval_steps": 1, "patience": 2}


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("value_trainer.ValueTrainer._load_best_model", PATIENT),
        ("train.write_checkpoint", PATIENT),
        ("train.write_checkpoint", {"max_steps": 4}),
    ],
)
def test_killed_behind_its_last_step_it_takes_no_other(
    place: str, options: dict[str, Any], base: Path, data: Path, tmp_path: Path
) -> None:
    """All steps are saved, the checkpoint is not."""
    run(data, tmp_path / "whole", base, **{"max_steps": 9} | options)

    def killed(*_: Any) -> None:
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"trainer.training.{place}", killed)
        with pytest.raises(KilledError):
            run(data, tmp_path / "out", base, **{"max_steps": 9} | options)
    run(data, tmp_path / "out", base, **{"max_steps": 9} | options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_held_out_texts_are_judged_by_what_is_known(
    base: Path, tmp_path: Path, history: list[dict[str, Any]]
) -> None:
    """Not by the model's own values, which move: cut texts count below their bound only."""
    rows = toy_rows() + [row(90 + i, [255], [2] * 60, "length") for i in range(30)]
    data = write(tmp_path / "cut.parquet", rows)
    seen = []
    for censored in ("bound", "bootstrap"):
        history.clear()
        options = WATCHED | {"learning_rate": 1e-12, "max_steps": 2, "censored": censored}
        run(data, tmp_path / censored, base, **options)
        seen += looks(history)
    assert seen[0] == pytest.approx(seen[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_steps": 0, "holdout": 0.5}, "^eval_steps: 0, must be above 0"),
        ({"eval_steps": 5}, "^eval_steps: 5, must be left out with holdout 0"),
        ({"patience": 0, "eval_steps": 5, "holdout": 0.5}, "^patience: 0, must be above 0"),
        ({"patience": 3}, "^patience: 3, must be left out without eval_steps"),
        ({"eval_steps": 5, "holdout": 1e-6}, "^holdout: 1e-06, must be larger: nothing of "),
    ],
)
def test_what_cannot_be_watched_is_named(
    options: dict[str, Any], message: str, base: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path / "out", base, **options)
    assert not (tmp_path / "out").exists()
