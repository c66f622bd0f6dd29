"""Losses, targets and lambda-returns, each against a loop over tokens."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.training import rollout
from trainer.data import NO_LABEL, Example, PackedDataset, make_example
from trainer.scan import backward_scan
from trainer.training.losses import lambda_returns, token_losses
from trainer.training.objective import Objective
from value_server.contract.targets import TARGETS, Readout, Target
from value_server.contract.values import length_from_logit

GAMMA = 0.97
SCALE = 60.0

positions = st.lists(
    st.tuples(
        st.floats(-10, 10), st.sampled_from([NO_LABEL, 1.0, 2.0, 30.0, 200.0]), st.booleans()
    ),
    min_size=1,
    max_size=20,
)


def naive_output(target: Target, raw: float) -> float:
    if target in ("discounted_return", "normalised_length"):
        return 1 / (1 + math.exp(-raw))
    return math.log1p(math.exp(raw))


def naive_label(target: Target, r: float) -> float:
    return {
        "discounted_return": 1 - GAMMA**r,
        "normalised_length": min(r / SCALE, 1.0),
        "length": r / SCALE,
        "log_length": math.log(1 + r),
    }[target]


def naive_loss(loss: str, y: float, label: float) -> float:
    error = abs(y - label)
    if loss == "squared":
        return error**2
    if loss == "huber":
        return error**2 / 2 if error < 0.1 else 0.1 * (error - 0.05)

    def cross(p: float, q: float) -> float:
        return -sum(a * math.log(b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0)

    return cross(label, y) - cross(label, label)


COMBINATIONS = [
    (target, loss)
    for target in TARGETS
    for loss in ("squared", "huber", "bce")
    if loss != "bce" or target in ("discounted_return", "normalised_length")
]


@pytest.mark.parametrize("censored", ["drop", "bound", "prompt"])
@pytest.mark.parametrize(("target", "loss"), COMBINATIONS)
@given(rows=positions)
def test_losses_equal_a_loop(target: Target, loss: Any, censored: Any, rows: Any) -> None:
    raw, labels, is_cut = map(list, zip(*rows, strict=True))
    objective = Objective(target=target, loss=loss, censored=censored)
    found = token_losses(
        torch.tensor([raw]),
        torch.tensor([labels]),
        torch.tensor([is_cut]),
        torch.arange(len(raw))[None],
        objective,
        Readout(target, GAMMA, SCALE),
    )[0].tolist()
    for z, r, cut, value in zip(raw, labels, is_cut, found, strict=True):
        if r == NO_LABEL:
            continue
        y, label = naive_output(target, z), naive_label(target, r)
        free = censored != "drop" and cut and y >= label
        assert value == pytest.approx(0 if free else naive_loss(loss, y, label), abs=2e-4, rel=1e-4)


@pytest.mark.parametrize("loss", ["squared", "huber", "bce"])
def test_a_bound_pulls_up_only(loss: Any) -> None:
    raw = torch.tensor([[-1.0, 5.0]], requires_grad=True)
    labels, is_cut = torch.full((1, 2), 50.0), torch.ones(1, 2, dtype=torch.bool)
    objective = Objective(loss=loss, censored="bound")
    readout = Readout("discounted_return", GAMMA)
    token_losses(raw, labels, is_cut, torch.arange(2)[None], objective, readout).sum().backward()
    assert raw.grad is not None
    assert raw.grad[0, 0] < 0
    assert raw.grad[0, 1] == 0


@pytest.mark.parametrize("target", TARGETS)
def test_a_perfect_output_reads_back_as_its_length(target: Target) -> None:
    """The raw output that gives the label of r gives the z of r, too."""
    r = torch.tensor([1.0, 7.0, 30.0, 59.0], dtype=torch.float64)
    readout = Readout(target, GAMMA, SCALE)
    y = readout.label(r)
    raw = y.logit() if target in ("discounted_return", "normalised_length") else y.expm1().log()
    torch.testing.assert_close(readout.output(raw), y)
    torch.testing.assert_close(length_from_logit(readout.logit(raw), GAMMA), r)


# --- lambda-returns -----------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(-5, 5)), min_size=1, max_size=40),
    st.booleans(),
)
def test_a_scan_equals_a_loop(pairs: list[tuple[float, float]], twice: bool) -> None:
    factors, terms = (torch.tensor([side] * (1 + twice)) for side in zip(*pairs, strict=True))
    expected, x = [], 0.0
    for a, b in reversed(pairs):
        x = b + a * x
        expected.append(x)
    found = backward_scan(factors, terms)
    torch.testing.assert_close(
        found, torch.tensor([expected[::-1]] * len(found)), rtol=1e-4, atol=1e-4
    )


def naive_returns(example: Example, u: list[float], lam: float) -> list[float | None]:
    """One text by the recursion, from its last state back."""
    labels = example.labels.tolist()
    states = [t for t, r in enumerate(labels) if r != NO_LABEL]
    out: list[float | None] = [None] * len(labels)
    for t in reversed(states):
        if t != states[-1]:
            after = out[t + 1]
            assert after is not None
            out[t] = (1 - GAMMA) + GAMMA * ((1 - lam) * u[t + 1] + lam * after)
        else:
            out[t] = u[t] if example.is_cut else 1 - GAMMA ** labels[t]
    return out


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_lambda_returns_equal_a_loop_in_each_text_of_a_pack(lam: float) -> None:
    """Texts that ended, were cut by max_tokens, and reach beyond max_length."""
    sizes = [(2, 9, True), (4, 3, False), (1, 30, True), (1, 30, False), (5, 1, True), (3, 2, True)]
    dataset = PackedDataset([make_example(rollout(*s), 20) for s in sizes], 100, seed=0)
    (members,), item = dataset.packs, dataset[0]
    u = torch.rand(1, len(item["labels"]), generator=torch.Generator().manual_seed(0))
    names = ("labels", "is_cut", "position_ids")
    found = lambda_returns(u, *(item[n][None] for n in names), GAMMA, lam)[0].tolist()
    start = 0
    for i in members:
        example = dataset.examples[i]
        part = slice(start, start + len(example.labels))
        expected = naive_returns(example, u[0, part].tolist(), lam)
        for value, wanted in zip(found[part], expected, strict=True):
            assert wanted is None or value == pytest.approx(wanted, abs=1e-5)
        start = part.stop


def test_with_lambda_1_they_are_the_discounted_return() -> None:
    item = PackedDataset([make_example(rollout(3, 15), 99)], 99, seed=0)[0]
    labels = item["labels"][None]
    u = torch.rand(labels.shape)
    found = lambda_returns(u, labels, item["is_cut"][None], item["position_ids"][None], GAMMA, 1.0)
    labelled = labels != NO_LABEL
    torch.testing.assert_close(found[labelled], 1 - GAMMA ** labels[labelled])


def test_no_gradient_goes_through_a_target() -> None:
    raw = torch.zeros(1, 3, requires_grad=True)
    token_losses(
        raw,
        torch.tensor([[3.0, 2.0, 1.0]]),
        torch.zeros(1, 3, dtype=torch.bool),
        torch.arange(3)[None],
        Objective(gae_lambda=0.0),
        Readout("discounted_return", GAMMA),
    )[0, 0].backward()
    assert raw.grad is not None
    assert raw.grad[0, 0] != 0
    assert raw.grad[0, 1:].tolist() == [0, 0]


# --- combinations -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.9, "gamma_percentile": 95.0}, "gamma_percentile: 95.0, .* beside gamma"),
        ({"target_scale": 9.0}, "target_scale: 9.0, must be left out with discounted_return"),
        ({"target": "log_length", "target_scale": 9.0}, "target_scale: 9.0, .* log_length"),
        ({"target": "length", "target_scale": 0.0}, "target_scale: 0.0, must be above 0"),
        ({"huber_delta": 0.2}, "huber_delta: 0.2, must be left out with loss squared"),
        ({"loss": "huber", "huber_delta": -1.0}, "huber_delta: -1.0, must be above 0"),
        ({"loss": "bce", "target": "length"}, "loss: 'bce', must be .* target length"),
        ({"gae_lambda": 0.5, "target": "length"}, "gae_lambda: 0.5, must be 1 with length"),
        ({"gae_lambda": 0.5, "censored": "bound"}, "gae_lambda: 0.5, must be 1 with censored"),
        ({"gae_lambda": 0.5, "censored": "prompt"}, "gae_lambda: 0.5, must be 1 with censored"),
        ({"prompt_weight": 0.0}, "prompt_weight: 0.0, must be above 0"),
        ({"censored": "bootstrap", "target": "log_length"}, "censored: 'bootstrap', must be"),
    ],
)
def test_a_combination_without_meaning_is_named(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Objective(**options).check()
