"""The lookahead head's part of the loss, and whole runs that learn it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tests.support.tiny import GAMMA, tiny_model
from tests.support.training import LENGTHS, candidates, rollout, row, run, write
from trainer.candidates import Candidates, text_key, write_candidates
from trainer.data import PackedDataset, collate, make_example
from trainer.training.ahead import (
    candidate_losses,
    places_of,
    sampled_loss,
    sampled_places,
    scored_places,
)
from trainer.training.backbone import as_value_head
from trainer.training.objective import Objective
from value_server.contract.checkpoint import read_config
from value_server.contract.targets import Readout
from value_server.contract.values import logit_from_length, value_from_length
from value_server.model.value_model import ValueModel

READOUT = Readout("discounted_return", GAMMA)


def batch(cut: bool = False) -> dict[str, torch.Tensor]:
    """Two rows of several texts, the shorter one padded."""
    sizes = [(3, 5), (2, 1), (1, 4), (4, 2)]
    examples = [make_example(rollout(*s, finished=not cut), 8) for s in sizes]
    scored = [replace(e, candidates=candidates(0, [1])) for e in examples[:2]]
    dataset = PackedDataset([*scored, *examples[2:]], 12, seed=0)
    return collate([dataset[0], dataset[1]])


@pytest.mark.parametrize("cut", [False, True])
def test_the_sampled_tokens_label_is_the_target(cut: bool) -> None:
    """Text by text: the loss at each position whose next token is in the text and labelled."""
    rows = batch(cut)
    (places, nexts), _ = places_of(rows)
    z = torch.randn(len(places), 1, generator=torch.Generator().manual_seed(0))
    given = {int(place): z[i, 0] for i, place in enumerate(places)}
    flat = {name: rows[name].flatten().tolist() for name in ("position_ids", "labels", "input_ids")}
    total, seen = torch.tensor(0.0), 0
    for at in range(len(flat["labels"]) - 1):
        if flat["position_ids"][at + 1] != flat["position_ids"][at] + 1:
            continue
        if flat["labels"][at] >= 0 and flat["labels"][at + 1] >= 0:
            target = 1 - GAMMA ** flat["labels"][at + 1]
            assert nexts[(places == at).nonzero().item()].item() == flat["input_ids"][at + 1]
            total += (given[at].sigmoid() - target) ** 2
            seen += 1
    assert seen == len(places) > 4
    target = value_from_length(rows["labels"].clamp(min=0), GAMMA)
    found = sampled_loss(z, places, target, rows, Objective(), READOUT)
    torch.testing.assert_close(found, total)


def test_the_end_and_other_texts_are_no_next_tokens() -> None:
    """A prompt of 2 with 3 tokens, its end included, then one of 1 with 2: labels 3 2 1, 2 1."""
    none = -100.0
    labels = torch.tensor([[none, 3, 2, 1, none, 2, 1, none]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    assert sampled_places(labels, positions).tolist() == [1, 2, 5]
    ends = torch.tensor([[none, 1, 1, none]])  # the end of the first left out by max_length
    assert sampled_places(ends, torch.tensor([[0, 1, 0, 1]])).tolist() == []


def test_candidates_are_asked_for_where_they_are() -> None:
    rows = batch()
    _, (places, nexts) = places_of(rows)
    assert len(places) == 2
    assert places.tolist() == scored_places(rows).tolist()
    assert nexts.tolist() == [candidates(0, [1]).ids[0].tolist()] * 2


def test_mean_and_differences_are_the_error() -> None:
    """With weights of 1 they add up to the expected squared error over the candidates."""
    chance = torch.Generator().manual_seed(0)
    z, teacher = torch.randn(2, 9, 8, generator=chance)
    shares = torch.rand(9, 8, generator=chance).softmax(-1)
    error = z.sigmoid() - teacher.sigmoid()
    mean, within = candidate_losses(z, teacher, shares)
    torch.testing.assert_close(mean + within, (shares * error.square()).sum(-1))
    assert (mean > 0).all()
    same, differ = candidate_losses(teacher, teacher, shares)
    assert not same.any()
    assert not differ.any()
    even = candidate_losses(z, teacher, shares, 0.0)[1]
    centred = error - (shares * error).sum(-1, keepdim=True)
    torch.testing.assert_close(even, centred.square().mean(-1))


def toy(folder: Path) -> tuple[Path, Path]:
    """Rollouts whose candidates tell their values: of token x that is of x tokens to come."""
    chance, rows, found = np.random.default_rng(0), [], {}
    for i in range(24):
        length = LENGTHS[i % 3]
        text = [255, 255, length, *range(length - 1, 0, -1), 256]
        rows.append(row(i, text[:3], text[3:]))
        positions = np.arange(2, len(text) - 1)
        ids = np.stack([chance.permutation(np.arange(1, 41))[:4] for _ in positions])
        z = logit_from_length(torch.from_numpy(ids).double(), 0.9).float().numpy()
        p = np.full(ids.shape, 0.2, np.float32)
        found[text_key(np.array(text))] = Candidates(positions, ids, p, z)
    (folder / "candidates").mkdir()
    write_candidates(folder / "candidates" / "0.parquet", found, {"gamma": 0.9})
    return write(folder / "toy.parquet", rows), folder / "candidates"


def test_a_run_learns_what_each_token_means(base: Path, tmp_path: Path) -> None:
    """Whatever the text, the value after x is that of x: no constant is near it."""
    data, given = toy(tmp_path)
    options: dict[str, Any] = {
        "tune": "full",
        "gamma": 0.9,
        "learning_rate": 3e-3,
        "max_steps": 40,
        "lookahead": 8,
        "candidates": given,
        "packs_per_pass": 3,
    }
    run(data, tmp_path / "out", base, **options)
    facts = read_config(tmp_path / "out")
    assert facts.lookahead_rank == 8
    assert facts.training["candidates"] == "candidates"
    model = ValueModel.load(tmp_path / "out")
    x = torch.arange(1, 41)
    with torch.inference_mode():
        u = model.following(model.hidden(torch.tensor([[255, 255, 20]]))[0, -1], x).sigmoid()
    target = 1 - 0.9**x
    assert (u - target).square().mean() < target.var() / 4


@pytest.mark.parametrize("sampled", ["value", "label"])
def test_without_candidates_sampled_tokens_teach(
    sampled: str, base: Path, data: Path, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"tune": "full", "learning_rate": 3e-3, "max_steps": 30}
    more |= {"sampled": sampled}
    run(data, tmp_path / "out", base, lookahead=8, **more)
    model = ValueModel.load(tmp_path / "out")
    text = torch.tensor([[255, 255, 40, *range(39, 20, -1)]])
    with torch.inference_mode():
        told = model.following(model.hidden(text)[0, 2:-1], text[0, 3:, None])[:, 0].sigmoid()
    label = 1 - model.lenvm.gamma ** text[0, 3:].float()
    assert (told - label).square().mean() < 0.01
    assert "candidates" not in read_config(tmp_path / "out").training


def test_packs_of_a_pass_change_nothing_but_speed(
    base: Path, tmp_path: Path, history: list[dict[str, Any]]
) -> None:
    data, given = toy(tmp_path)
    for number in (1, 3):
        more = {"lookahead": 4, "candidates": given, "packs_per_pass": number, "gamma": 0.9}
        run(data, tmp_path / str(number), base, tune="lora", max_steps=3, **more)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lookahead": -1}, "lookahead: -1, must be at least 0"),
        ({"lookahead": 4, "target": "length"}, "lookahead: 4, must be 0 with target length"),
        ({"candidates": Path("x")}, "candidates: 'x', must be left out without lookahead"),
        ({"lookahead": 4, "within_weight": -1.0}, "within_weight: -1.0, must be at least 0"),
        ({"sampled": "token"}, "sampled: 'token', must be one of value, label"),
        ({"packs_per_pass": 0}, "packs_per_pass: 0, must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], message: str, base: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        run(data, tmp_path / "out", base, **options)
    assert not (tmp_path / "out").exists()


def test_candidates_of_other_texts_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    write_candidates(tmp_path / "0.parquet", {"other": candidates(0, [1])}, {"gamma": 0.9})
    with pytest.raises(ValueError, match=r"^candidates: .* no text is among them"):
        run(data, tmp_path / "out", base, lookahead=4, candidates=tmp_path / "0.parquet")


def test_a_fresh_head_tells_the_value_itself() -> None:
    """Before any step all next tokens change nothing."""
    plain = tiny_model()
    config = msgspec.structs.replace(plain.lenvm, lookahead_rank=4)
    model = ValueModel(plain.backbone, plain.head, config)
    as_value_head(model)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        z = model(ids)
        told = model.following(model.hidden(ids), torch.arange(40).view(1, 20, 2))
    torch.testing.assert_close(told, z[..., None].expand(1, 20, 2))
