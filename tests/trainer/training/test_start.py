"""Training that goes on from a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.training import run
from trainer.training.backbone import Backbone, Tune
from value_server.contract.checkpoint import read_config
from value_server.model.value_model import ValueModel

TUNES: list[Tune] = ["full", "lora", "head"]


def values(model: ValueModel) -> torch.Tensor:
    with torch.inference_mode():
        z: torch.Tensor = model.eval()(torch.arange(250)[None])
        return z


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("before", TUNES)
def test_it_begins_where_the_checkpoint_ended(
    before: Tune, tune: Tune, base: Path, data: Path, tmp_path: Path
) -> None:
    """And what it writes loads as it was trained, whatever of it trains. One layer of two."""
    first, second = tmp_path / "first", tmp_path / "second"
    run(data, first, base, tune=before, num_layers=1, max_steps=2, learning_rate=1e-2, gamma=0.9)
    if (before, tune) == ("full", "lora"):
        with pytest.raises(ValueError, match=r"^tune: 'lora', must be full or head"):
            run(data, second, base, tune=tune, start=first)
        return
    backbone = Backbone(model=str(base), tune=tune, start=first)
    fresh = backbone.build(read_config(first), torch.float32)
    torch.testing.assert_close(values(fresh), values(ValueModel.load(first, str(base))))
    trained = {name.split(".")[0] for name, p in fresh.named_parameters() if p.requires_grad}
    assert trained == ({"head"} if tune == "head" else {"head", "backbone"})

    run(data, second, base, tune=tune, start=first, max_steps=2, learning_rate=1e-2, lookahead=4)
    config, there = read_config(second), values(ValueModel.load(second, str(base)))
    assert (config.gamma, config.num_layers, config.lookahead_rank) == (0.9, 1, 4)
    assert not torch.allclose(there, values(ValueModel.load(first, str(base))), atol=1e-3)


def test_a_lookahead_head_goes_on_as_well(base: Path, data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "first", base, lookahead=4, max_steps=2, learning_rate=1e-2)
    config, first = read_config(tmp_path / "first"), ValueModel.load(tmp_path / "first", str(base))
    fresh = Backbone(model=str(base), tune="head", start=tmp_path / "first").build(
        config, torch.float32
    )
    assert fresh.lookahead
    assert first.lookahead
    for name, weight in first.lookahead.state_dict().items():
        assert torch.equal(fresh.lookahead.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.8}, "gamma: 0.8, must be 0.9, as "),
        ({"target": "length"}, "target: 'length', must be discounted_return, as "),
        ({"num_layers": 1}, "num_layers: 1, must be 2, as "),
    ],
)
def test_what_the_checkpoint_has_otherwise_is_refused(
    options: dict[str, Any], message: str, base: Path, data: Path, tmp_path: Path
) -> None:
    run(data, tmp_path / "first", base, max_steps=1, gamma=0.9)
    with pytest.raises(ValueError, match=f"^{message}"):
        run(data, tmp_path / "second", base, start=tmp_path / "first", **options)
    with pytest.raises(ValueError, match="nothing"):
        run(data, tmp_path / "second", base, start=tmp_path / "nothing")
