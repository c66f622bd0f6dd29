"""Training that goes on from a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_llm import tiny_llm
from tests.support.training import NAME, run
from trainer.training.backbone import Backbone, Tune
from value_server.contract.checkpoint import CheckpointError, read_config
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


def test_the_base_model_keeps_its_name_and_its_tokenizer(
    base: Path, data: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run(data, first, base, max_steps=1)
    run(data, second, base, start=first, base_model=None, max_steps=1)
    assert read_config(second).base_model == NAME
    other = tiny_llm(tmp_path / "other", more=("<more>",))
    with pytest.raises(ValueError, match=rf"^model: '{other}', must be one with the tokenizer"):
        run(data, tmp_path / "third", other, start=first)


@pytest.mark.parametrize("lost", ["adapter_model", "value_head"])
def test_weights_that_are_missing_are_named(
    lost: str, base: Path, data: Path, tmp_path: Path
) -> None:
    """An adapter's, too, where peft would go on with random ones."""
    first = tmp_path / "first"
    run(data, first, base, tune="lora", max_steps=1)
    path = first / f"{lost}.safetensors"
    weights = load_file(path)
    del weights[min(weights)]
    save_file(weights, path)
    for tune in TUNES:
        backbone = Backbone(model=str(base), tune=tune, start=first)
        with pytest.raises(CheckpointError, match=f"^{first}: (?is:.*missing)"):
            backbone.build(read_config(first), torch.float32)
