"""Length advantages against naive loops, and an example that learns to be brief."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.tiny import GAMMA, tiny_model
from trainer.examples.length_rl import main
from trainer.rl import (
    combine,
    completion_logits,
    gae,
    length_rewards,
    length_values,
    linear_schedule,
)
from value_server.contract.values import logit_from_length, value_from_length

LENGTHS = (1, 4, 9, 12)
R = 12
ENDED = torch.tensor([True, True, True, False])
MASK = torch.arange(R)[None] < torch.tensor(LENGTHS)[:, None]


def random_logits(seed: int = 0) -> Tensor:
    return torch.randn(len(LENGTHS), R + 1, generator=torch.manual_seed(seed), dtype=torch.float64)


def naive_advantages(z: Tensor, lam: float) -> Tensor:
    """Row by row, from the definition as a sum over what follows."""
    out = torch.zeros(len(LENGTHS), R, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        values = (-torch.sigmoid(z[row])).tolist()
        if ENDED[row]:
            values[length] = 0.0
        deltas = [-(1 - GAMMA) + GAMMA * values[t + 1] - values[t] for t in range(length)]
        for t in range(length):
            out[row, t] = sum((GAMMA * lam) ** (k - t) * deltas[k] for k in range(t, length))
    return out


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_advantages_are_those_of_the_definition(lam: float) -> None:
    z = random_logits()
    values = length_values(z, MASK, ENDED)
    advantages, returns = gae(length_rewards(MASK, GAMMA), values, MASK, GAMMA, lam)
    torch.testing.assert_close(advantages, naive_advantages(z, lam), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(returns, (advantages + values[:, :-1]) * MASK)


def test_returns_are_the_labels_of_the_trainer() -> None:
    """-(1 - gamma^r) with r tokens to come, whatever the baseline says, for what ended."""
    values = length_values(random_logits(), MASK, ENDED)
    _, returns = gae(length_rewards(MASK, GAMMA), values, MASK, GAMMA)
    to_come = torch.tensor(LENGTHS)[:, None] - torch.arange(R)[None]
    expected = -value_from_length(to_come.clamp(min=0).double(), GAMMA) * MASK
    torch.testing.assert_close(returns[ENDED], expected[ENDED], rtol=1e-5, atol=1e-7)


def test_an_exact_baseline_leaves_no_advantage() -> None:
    to_come = torch.tensor(LENGTHS)[:, None] - torch.arange(R + 1)[None]
    z = logit_from_length((to_come + ~ENDED[:, None]).clamp(min=0).double(), GAMMA)
    values = length_values(z, MASK, ENDED)
    for lam in (0.0, 0.7, 1.0):
        advantages, _ = gae(length_rewards(MASK, GAMMA), values, MASK, GAMMA, lam)
        assert advantages.abs().max() < 1e-6


def test_a_cut_completion_goes_on_from_the_value_at_its_cut() -> None:
    """Taken for finished, it would look cheap, and the policy would learn to run into the limit."""
    z = random_logits()
    cut, finished = (length_values(z, MASK, e) for e in (ENDED, torch.ones(4, dtype=torch.bool)))
    assert cut[3, -1] == -torch.sigmoid(z[3, -1])
    assert finished[3, -1] == 0
    rewards = length_rewards(MASK, GAMMA)
    costs = [gae(rewards, v, MASK, GAMMA)[1][3, 0] for v in (cut, finished)]
    assert costs[0] < costs[1]


def test_what_stands_on_padding_changes_nothing() -> None:
    z = random_logits()
    noisy = torch.where(torch.cat([MASK[:, :1], MASK], dim=1), z, 99.0)
    results = [
        gae(length_rewards(MASK, GAMMA), length_values(x, MASK, ENDED), MASK, GAMMA, 0.9)
        for x in (z, noisy)
    ]
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(before[ENDED], after[ENDED])
        assert not before[~MASK].any()


def test_combination_with_the_task() -> None:
    length = torch.full((4, R), -0.5)
    shared = combine(torch.tensor([1.0, 2.0, 3.0, 4.0]), length, MASK, 0.1)
    own = combine(torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].expand(4, R), length, MASK, 0.1)
    assert torch.equal(shared, own)
    assert shared[1].tolist() == pytest.approx([1.95] * 4 + [0.0] * 8)
    assert torch.equal(combine(length, length, MASK, 0.0), length * MASK)


def test_the_scale_follows_a_line_and_stays() -> None:
    scale = linear_schedule(0.2, 1.0, 4)
    assert [scale(step) for step in (-1, 0, 1, 2, 4, 9)] == pytest.approx(
        [0.2, 0.2, 0.4, 0.6, 1.0, 1.0]
    )


def test_padding_on_the_left_is_not_seen() -> None:
    model = tiny_model()
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 255, n) for n in (2, 5)]
    completions = generator.integers(0, 255, (2, 6))
    padded = [[256] * (5 - len(p)) + [*p, *c] for p, c in zip(prompts, completions, strict=True)]
    attention = torch.tensor([[0] * (5 - len(p)) + [1] * (len(p) + 6) for p in prompts])
    with torch.inference_mode():
        z = completion_logits(model, torch.tensor(padded), attention, 6)
        for row, (p, c) in enumerate(zip(prompts, completions, strict=True)):
            alone = model(torch.tensor([[*p, *c]]))[0, len(p) - 1 :]
            torch.testing.assert_close(z[row], alone, rtol=1e-4, atol=1e-5)
    assert z.shape == (2, 7)


def test_bad_arguments_are_named() -> None:
    values = torch.zeros(4, R)
    with pytest.raises(ValueError, match=r"^values: \(4, 12\), must be \(4, 13\)"):
        gae(length_rewards(MASK, GAMMA), values, MASK, GAMMA)
    with pytest.raises(ValueError, match=r"^values: \(4, 12\), must be \(4, 13\)"):
        length_values(values, MASK, ENDED)
    with pytest.raises(ValueError, match=r"^lam: 1\.5, must be"):
        gae(length_rewards(MASK, GAMMA), torch.zeros(4, R + 1), MASK, GAMMA, 1.5)
    with pytest.raises(ValueError, match="gamma must lie"):
        length_rewards(MASK, 1.0)
    with pytest.raises(ValueError, match=r"^steps: 0, must be"):
        linear_schedule(0, 1, 0)


def test_the_example_learns_the_task_and_to_be_brief() -> None:
    """Two tokens are the optimum. Without the length advantages nothing asks for brevity."""
    result = main(steps=60)
    assert result["tokens"][0] > 8 > 4 > result["tokens"][1]
    assert result["done"][1] > 0.9 > result["done"][0]
