"""Training: whole runs of a tiny Llama on the toy task (see tests.support.training)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.support.tiny import tiny_tokenizer
from tests.support.training import CONSTANT_LOSS, LENGTHS, NAME, contents, run, toy_rows, write
from trainer.evaluation.evaluate import evaluate
from trainer.reading import Reading
from trainer.training.backbone import Tune
from value_server.contract.checkpoint import read_config, tokenizer_fingerprint
from value_server.contract.values import length_from_logit
from value_server.contract.weights import weights_fingerprint
from value_server.model.value_model import ValueModel


@pytest.mark.parametrize(("tune", "layers"), [("full", None), ("lora", 1), ("head", 1)])
def test_a_run_ends_with_a_checkpoint_that_loads(
    tune: Tune,
    layers: int | None,
    base: Path,
    data: Path,
    tmp_path: Path,
    history: list[dict[str, Any]],
) -> None:
    """With its card, and TensorBoard's log beside it."""
    out = tmp_path / "out"
    more = {"learning_rate": 3e-3, "max_steps": 24, "tensorboard": tmp_path / "log"}
    run(data, out, base, tune=tune, num_layers=layers, **more)

    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 24
    assert losses[0] > CONSTANT_LOSS
    assert max(losses[-3:]) < CONSTANT_LOSS / 4

    model = ValueModel.load(out, str(base))
    assert model.config.num_hidden_layers == (layers or 2)
    with torch.inference_mode():
        values = [model(torch.tensor([[255, 255, n]]))[0, -1].item() for n in LENGTHS]
    assert values == sorted(values)

    files = contents(out)
    assert {Path(name).suffix for name in files} == {".json", ".safetensors", ".md"}
    assert not any(str(place).encode() in c for c in files.values() for place in (base, tmp_path))
    config = read_config(out)
    assert config.base_model == NAME
    assert config.base_fingerprint == weights_fingerprint(str(base)) != ""
    assert config.tokenizer_fingerprint == tokenizer_fingerprint(tiny_tokenizer())
    assert config.training["completions"] == 48
    events = EventAccumulator(str(tmp_path / "log")).Reload().Scalars("train/loss")
    assert [entry.step for entry in events] == [*range(1, 25)]
    assert [entry.value for entry in events] == pytest.approx(losses)
    curve = [np.mean(part) for part in np.array_split(losses, 10)]
    assert config.training["loss_curve"] == pytest.approx(curve)
    card = (out / "README.md").read_text()
    assert f"base_model: {NAME}\n" in card
    for fact in ("completions | 48", "learning_rate | 0.003", "max_steps | 24", "loss_curve | "):
        assert f"| {fact}" in card
    if tune == "lora":
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == NAME


@pytest.mark.parametrize(
    "choice",
    [
        {"loss": "huber", "weighting": "trajectory", "prompt_weight": 2.0},
        {"target": "normalised_length", "loss": "bce"},
        {"target": "length", "target_scale": 40.0, "batches": "grouped"},
        {"target": "log_length", "max_steps": 40},
        {"gae_lambda": 0.9, "censored": "bootstrap"},
        {"bf16": True},
    ],
    ids=str,
)
def test_each_choice_learns_the_toy_task(
    choice: dict[str, Any], base: Path, data: Path, tmp_path: Path
) -> None:
    """Read back as lengths, whatever the target: the best constant is wrong by far more."""
    longer = {"max_steps": 24, "tune": "full", "learning_rate": 3e-3} | choice
    run(data, tmp_path / "out", base, **longer)
    facts = read_config(tmp_path / "out")
    named = facts.training | {"target": facts.target, "target_scale": facts.target_scale}
    assert {name: named[name] for name in choice} == choice
    model = ValueModel.load(tmp_path / "out")
    with torch.inference_mode():
        z = torch.cat([model(torch.tensor([[255, 255, n]]))[0, -1:] for n in LENGTHS])
    lengths = length_from_logit(z, facts.gamma)
    torch.testing.assert_close(lengths, torch.tensor(LENGTHS).float(), rtol=0.5, atol=3)


def test_a_loss_that_is_no_number_ends_it(base: Path, data: Path, tmp_path: Path) -> None:
    """The bug guarded against: a checkpoint of such weights, and a loss that was told as 0."""
    with pytest.raises(
        ValueError, match=r"^learning_rate: 1e\+30, must be a smaller one: the .+ of step 2 is nan$"
    ):
        run(data, tmp_path / "out", base, tune="full", learning_rate=1e30)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_gradient_checkpointing_changes_nothing_but_the_memory(
    tune: Tune, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers run twice as often; with frozen weights below, a wrong set-up gives no gradient."""
    calls: list[int] = []
    forward = LlamaDecoderLayer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[-1] += torch.is_grad_enabled()  # not those that tell a decoder
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    for name in ("plain", "again"):
        calls.append(0)
        again = name == "again"
        run(data, tmp_path / name, base, tune=tune, max_steps=2, gradient_checkpointing=again)
    assert calls[1] == 2 * calls[0]
    models = [ValueModel.load(tmp_path / name, str(base)) for name in ("plain", "again")]
    with torch.inference_mode():
        values = [model(torch.arange(258)[None]) for model in models]
    torch.testing.assert_close(values[0], values[1])


def test_no_logits_of_the_vocabulary_are_computed(base: Path, data: Path, tmp_path: Path) -> None:
    """A pack's would be the largest tensor of all: nothing but weights has 258 columns."""

    seen: set[tuple[int, ...]] = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            seen.update(tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Shapes():
        run(data, tmp_path / "out", base, tune="full", max_steps=1)
        evaluate(tmp_path / "out", data, holdout=1.0, reading=Reading(only_json=True))
    assert (258, 128) in seen  # the embeddings
    assert not [shape for shape in seen if shape and shape[-1] == 258]


def test_a_folder_can_be_written_again(base: Path, data: Path, tmp_path: Path) -> None:
    """The bug guarded against: an adapter left from before is applied to the new backbone."""
    run(data, tmp_path / "out", base, tune="lora", seed=1, max_steps=1)
    tunes: list[Tune] = ["full", "lora", "head"]
    for tune in tunes:
        run(data, tmp_path / "out", base, tune=tune, max_steps=1, resume=False)
        run(data, tmp_path / tune, base, tune=tune, max_steps=1)
        again, fresh = (ValueModel.load(tmp_path / name, str(base)) for name in ("out", tune))
        with torch.inference_mode():
            assert torch.equal(again(torch.arange(258)[None]), fresh(torch.arange(258)[None]))
        assert bool(list((tmp_path / "out").glob("adapter_*"))) == (tune == "lora")


def test_weights_of_sources_are_those_of_the_loss(
    base: Path, tmp_path: Path, history: list[dict[str, Any]]
) -> None:
    """A step over all texts, 16 tokens of the first and 40 of the second: their weighted mean."""
    rows = toy_rows(3)
    data = [write(tmp_path / f"{n}.parquet", part) for n, part in enumerate((rows[:2], rows[2:]))]
    options = {"max_steps": 1, "tokens_per_step": 640, "gamma": 0.95}
    losses = []
    for name, inputs in enumerate((data[0], data[1], Path(f"{data[0]}=3,{data[1]}"))):
        history.clear()
        run(inputs, tmp_path / f"out-{name}", base, **options)
        losses.append(next(entry["loss"] for entry in history if "loss" in entry))
    assert losses[2] == pytest.approx((3 * 16 * losses[0] + 40 * losses[1]) / 88)
    assert losses[0] != pytest.approx(losses[1])
    assert read_config(tmp_path / "out-2").training["rollouts"] == "0.parquet=3,1.parquet"
