"""One step of training: packs, and the mean over all tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from tests.support.tiny import GAMMA, tiny_model
from trainer.data import NO_LABEL, PackedDataset, Rollout, collate, make_example
from trainer.training.objective import Objective
from trainer.training.value_trainer import ValueTrainer
from value_server.model.value_model import ValueModel


def rollout(prompt: int, completion: int) -> Rollout:
    generator = np.random.default_rng(prompt * 100 + completion)
    ids = generator.integers(0, 256, prompt + completion)
    return Rollout("p", "", ids[:prompt], ids[prompt:], True)


UNEVEN = [make_example(rollout(*sizes), 64) for sizes in [(9, 50), (3, 2), (4, 1), (2, 30)]]


def test_packed_texts_have_the_logits_of_separate_ones() -> None:
    """Two packs of several texts, a row each, as a training step sees them."""
    model = tiny_model().train()
    dataset = PackedDataset([make_example(rollout(p, 7), 64) for p in range(1, 9)], 40, seed=0)
    batch = collate([dataset[0], dataset[1]])
    members = [i for members in dataset.packs[:2] for i in members]
    texts = [torch.from_numpy(dataset.examples[i].input_ids)[None] for i in members]
    with torch.inference_mode():
        rows = model(batch["input_ids"], position_ids=batch["position_ids"])
        lengths = [len(dataset[0]["labels"]), len(dataset[1]["labels"])]
        packed = torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])[None]
        alone = torch.cat([model(text) for text in texts], dim=1)
    assert len(texts) > 4
    assert lengths[0] != lengths[1]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_loss_and_gradient_are_averages_over_all_tokens_of_a_step(tmp_path: Path) -> None:
    """Packs of a step differ in size: a mean of their means would give a token of a short one
    the weight of 25 others. The second step is a part of a step, one pack instead of three.
    """
    model = tiny_model()
    batches: list[dict[str, torch.Tensor]] = []

    def remember(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batches.append(collate(items))
        return batches[-1]

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        learning_rate=0,
        num_train_epochs=1,
        logging_steps=1,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    dataset = PackedDataset(UNEVEN, 64, seed=0)
    dataset.packs = [[i] for i in range(4)]
    value_trainer = ValueTrainer(
        model,
        arguments,
        train_dataset=dataset,
        data_collator=remember,
        objective=Objective(),
        readout=model.lenvm.readout,
    )
    value_trainer.train()
    logs = [entry for entry in value_trainer.state.log_history if "grad_norm" in entry]
    assert len(logs) == 2
    for entry, step in zip(logs, (batches[:3], batches[3:]), strict=True):
        expected = token_average(model, step)
        model.zero_grad()
        expected.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert entry["loss"] == pytest.approx(expected.item(), rel=1e-4)
        assert entry["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def token_average(model: ValueModel, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    losses = []
    for batch in batches:
        labelled = batch["labels"] != NO_LABEL
        u = model(batch["input_ids"])[labelled].sigmoid()
        losses.append((u - (1 - GAMMA ** batch["labels"][labelled])).square())
    return torch.cat(losses).mean()
