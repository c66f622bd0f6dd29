"""The optimizer's course, and who is told of it."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.training import run
from value_server.contract.checkpoint import read_config


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("cosine", [0, 1, 0.75, 0.25]),
        ("linear", [0, 1, 2 / 3, 1 / 3]),
        ("constant", [0, 1, 1, 1]),
    ],
)
def test_each_scheduler_takes_its_course(
    scheduler: str,
    rates: list[float],
    base: Path,
    data: Path,
    tmp_path: Path,
    history: list[dict[str, Any]],
) -> None:
    """After a step of warmup; those are the rates of the four steps."""
    options = {"scheduler": scheduler, "warmup_steps": 1, "max_steps": 4}
    run(data, tmp_path / "out", base, learning_rate=0.1, **options)
    found = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert found == pytest.approx([0.1 * rate for rate in rates])
    told = read_config(tmp_path / "out").training.get("scheduler", "cosine")
    assert told == scheduler


def test_weights_decay(base: Path, data: Path, tmp_path: Path) -> None:
    norms = []
    for decay in (0.0, 0.9):
        run(data, tmp_path / str(decay), base, learning_rate=0.1, weight_decay=decay)
        head = load_file(tmp_path / str(decay) / "value_head.safetensors")
        norms.append({name: float(tensor.norm()) for name, tensor in head.items()})
    weights = [name for name in norms[0] if name.endswith("weight")]
    assert weights
    assert all(norms[1][name] < norms[0][name] for name in weights)
    assert read_config(tmp_path / "0.9").training["weight_decay"] == 0.9


def test_trackers_are_told(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    run(data, tmp_path / "out", base, max_steps=1, report_to=("tensorboard",))
    assert list((tmp_path / "log").glob("events.*"))
    with pytest.raises(ValueError, match=r"^report_to: 'none-such', must be one that is installed"):
        run(data, tmp_path / "other", base, report_to=("none-such",))
