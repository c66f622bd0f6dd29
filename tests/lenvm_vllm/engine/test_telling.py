"""What is told of each step, against the plain sum over the vocabulary."""

import math
from pathlib import Path

import pytest
import torch

from lenvm_vllm.engine.telling import end_probabilities
from lenvm_vllm.telemetry.metrics import FOLDER
from lenvm_vllm.telemetry.progress import KEY, Known
from tests.support.fakes import Server, params
from tests.support.toy import EOS, request
from tests.support.v1_batch import added, processor_with, suppressed, update


def test_an_end_is_told_with_its_probability_in_six_digits() -> None:
    """Likely ends, ends of nearly nothing, forbidden ones, and likelier tokens at the far end."""
    size = 9000
    logits = torch.randn(40, size, generator=torch.Generator().manual_seed(0))
    logits[:, EOS] = torch.linspace(-30, 12, 40)
    logits[::3, -1] = 11.0
    logits[5], logits[6, EOS] = -math.inf, -math.inf
    logits[5, EOS] = 1.0
    states = {row: request(50, eos_ids=[EOS, 7, size]) for row in range(39, -1, -1)}
    told = dict(zip(states, end_probabilities(logits, states).here(), strict=True))
    p = logits.double().softmax(-1)[:, [EOS, 7]].sum(-1)
    for row, p_end in told.items():
        assert p_end == pytest.approx(float(p[row]), abs=4e-7, rel=1e-5)


def test_a_calm_text_has_nothing_that_its_rails_do() -> None:
    """Over whole texts: wherever nothing is looked at, the rails by themselves would do as much."""
    targets = [{"tokens": 30}, {"mode": "at_most", "tokens": 30}, {"mode": "at_least", "tokens": 9}]
    targets += [{"mode": "range", "min_tokens": 9, "max_tokens": 30}, {"mode": "tilt", "beta": 1.0}]
    calm = 0
    for target in targets:
        state = request({"tolerance": 0.1} | target, max_tokens=36)
        for length in [*range(40), 3, 20, 12, 29]:  # a text may also begin anew
            state.output_ids[:] = [50] * length
            state.renew()
            if (held := state.calm) is not None:
                calm += 1
                fresh = request({"tolerance": 0.1} | target, output=[50] * length, max_tokens=36)
                room = fresh.text_left
                assert held == fresh.held
                assert not fresh.force()
                assert room is None or room >= 4
    assert calm > 60


@pytest.mark.parametrize(("last", "most"), [(EOS, 99), (9, 3)])
def test_a_step_behind_the_end_is_not_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: int, most: int
) -> None:
    """Where token ids are hidden, the last step that was told is how long a text is known to be."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    key, output = "a" * 32, list[int]()
    served = processor_with(Server())
    wish = {"length_target": 3, "length_mode": "at_least", KEY: key}
    served.update_state(update(added=[added(0, params(wish, max_tokens=most), output)]))
    for token in (9, 9, last, 9, 9):
        suppressed(served, 1)
        output.append(token)
        served.update_state(None)
    step = Known().step(key, None, None)
    assert step is not None
    assert (step.counted, step.steps) == (3, 3)


def test_only_what_is_kept_of_a_text_is_a_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of each part of a prompt V1 samples a token that it drops, and a text may be preempted."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    key, output = "a" * 32, list[int]()
    served = processor_with(Server())
    wish = params({"length_target": 20, KEY: key})
    served.update_state(update(added=[added(0, wish, output)]))
    for token in (None, None, None, 9, 9):
        suppressed(served, 1)
        output += [token] if token else []
        served.update_state(None)
    step = Known().step(key, output, 2)
    assert step is not None
    assert (step.steps, step.steered) == (2, 2)
    served.update_state(update(removed=[0]))
    served.update_state(update(added=[added(0, wish, output)]))
    suppressed(served, 1)
    step = Known().step(key, [*output, 9], 3)
    assert step is not None
    assert step.steps == 3


def test_any_number_of_tokens_before_a_text_ends_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A front end that does not pass through `intake` does not compare it with the prompt."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    most, key = 2**31 - 1, "0" * 32
    target = {"length_target": most, "length_mode": "at_least", "length_prefix_tokens": most}
    served = processor_with(Server())
    served.update_state(update(added=[added(0, params(target | {KEY: key}))]))
    suppressed(served, 1)
    step = Known().step(key, None, 1)
    assert step is not None
    assert step.counted == most + 1
