"""What the engine tells the API server of its guided texts, through a file."""

import math
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.engine.telling import end_probabilities
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.telemetry import progress
from lenvm_vllm.telemetry.metrics import FOLDER
from lenvm_vllm.telemetry.progress import FORCED, LANDING, VALUED, Known, Progress

KEY = uuid.uuid4().hex


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


def write(engine: Progress, row: int, ids: list[int], flags: int = 0, p_end: float = 0.5) -> None:
    """All steps of one text, which knows at each step the tokens before it."""
    for index in range(len(ids)):
        engine.tell(
            rows=[row],
            index=[index],
            counted=[index + 1],
            token=[ids[index - 1] if index else -1],
            p_end=[p_end],
            expected=[float(len(ids) - index - 1)],
            flags=[flags],
            steps=[index + 1],
            steered=[index],
        )


def opened(engine: Progress, key: str = KEY) -> int:
    row = engine.open(key)
    assert row is not None
    return row


def test_the_last_step_of_a_text() -> None:
    engine = Progress()
    ids = list(range(100, 300))
    write(engine, opened(engine), ids, flags=FORCED | VALUED, p_end=0.25)
    step = Known().step(KEY, ids, len(ids))
    assert step is not None
    assert (step.p_end, step.expected) == (0.25, 0)
    assert (step.forced, step.landing, step.valued) == (True, False, True)
    assert (step.steps, step.steered) == (200, 199)


def test_a_step_too_many_does_not_hide_the_last_one() -> None:
    """vLLM may have run a finished request for a step more."""
    engine = Progress()
    ids = list(range(100))
    write(engine, opened(engine), [*ids, 0], flags=LANDING)
    step = Known().step(KEY, ids, len(ids))
    assert step is not None
    assert (step.expected, step.landing) == (1, True)
    assert (step.steps, step.steered) == (100, 100)


def test_the_steps_of_a_sample_are_not_those_of_a_longer_one_that_began_alike() -> None:
    engine = Progress()
    for ids in ([7, 8, 9, 9, 9], [7, 0]):
        write(engine, opened(engine), ids)
    step = Known().step(KEY, [7, 0], 2)
    assert step is not None
    assert (step.steps, step.steered) == (2, 2)


def test_samples_with_one_key_are_told_apart_by_their_tokens() -> None:
    engine = Progress()
    texts = [[7, number, 9, 9, 0] for number in range(4)]
    for number, ids in enumerate(texts):
        write(engine, opened(engine), ids, p_end=number / 10)
    for number, ids in enumerate(texts):
        step = Known().step(KEY, ids, 5)
        assert step is not None
        assert step.p_end == pytest.approx(number / 10)
    assert Known().step(KEY, [7, 5, 9, 9, 0], 5) is None


def test_what_is_not_told_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Progress()
    write(engine, opened(engine), [1, 2, 3])
    known = Known()
    assert known.step(uuid.uuid4().hex, [1, 2, 3], 3) is None
    assert known.step(KEY, [1, 2, 3, 4], 4) is None
    assert known.step(KEY, None, 0) is None
    assert known.step("no key", None, 3) is None
    assert known.step(KEY, None, 3) is not None
    assert known.step(KEY, None, None) == known.step(KEY, None, 3)
    for key in (None, 7, "zz" * 16, KEY[1:], "-" + KEY[1:], "1_" * 15 + "11", KEY + "\n"):
        assert engine.open(key) is None
    monkeypatch.delenv(FOLDER)
    assert Progress().open(KEY) is None
    assert Known().step(KEY, None, 3) is None


def test_a_row_is_not_taken_from_a_running_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "ROWS", 2)
    engine = Progress()
    first, second = opened(engine, "1" * 32), opened(engine, "2" * 32)
    assert engine.open("3" * 32) is None
    write(engine, first, [5])
    engine.close(first)
    known = Known()
    assert known.step("1" * 32, [5], 1) is not None  # it has ended, and is known still
    assert opened(engine, "3" * 32) == first
    assert known.step("1" * 32, [5], 1) is None
    write(engine, second, [6])
    assert known.step("2" * 32, [6], 1) is not None


def test_a_folder_that_takes_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(folder / "nowhere"))
    engine = Progress()
    assert engine.open(KEY) is None
    engine.tell([], [], [], [])


def state_of(tokens: int, output: list[int], **rest: Any) -> RequestState:
    target = LengthTarget(tokens=tokens, **rest)
    return RequestState(target, [1], output, eos_ids=[0, 2])


def test_the_probability_of_the_end_is_that_of_all_end_tokens() -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    states = {2: state_of(2, [5]), 0: state_of(100, [5])}
    found = end_probabilities(logits, states).here()
    naive = logits[2].double().softmax(-1)
    assert found[0] == pytest.approx(float(naive[0] + naive[2]), rel=1e-5)
    assert math.isnan(found[1])  # the rail allows none yet
