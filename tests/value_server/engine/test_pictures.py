"""Texts with pictures: scored as by plain transformers' whole model, everything at once.

Odds of passing by luck: candidates' logits differ by 0.05 and more, the tolerance is 1e-4.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.seeing import Seer, digests
from tests.support.slots import check_integrity
from tests.support.tiny_vision import BACKBONES
from value_server.engine.engine import Engine
from value_server.engine.job import Job, Row


@pytest.fixture(params=BACKBONES)
def seer(request: pytest.FixtureRequest, tmp_path: Path) -> Seer:
    return Seer.of(request.param, tmp_path)


def engine(seer: Seer, numbers: list[int], **options: Any) -> Engine:
    served = Engine(seer.value, **({"slots": 2048} | options))
    seer.show(served, numbers)
    return served


def check(seer: Seer, row: Row, text: list[int], numbers: list[int]) -> None:
    expected = [seer.z([*text, c], numbers) for c in row.candidates]
    np.testing.assert_allclose(row.logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("numbers", [[], [0], [2, 0, 1]], ids=["none", "one", "three"])
def test_served_as_by_plain_transformers(seer: Seer, numbers: list[int]) -> None:
    """A prompt, and a step that goes on from the cache."""
    text = seer.text(numbers)
    served = engine(seer, numbers)
    served.warm_up()
    row = Row("a", 0, text, [1, 2, 3], pictures=digests(numbers))
    served.run(Job([row]))
    check(seer, row, text, numbers)
    assert np.ptp(row.logits) > 0.05
    row = Row("a", len(text), [2, 9], [5, 6])
    served.run(Job([row]))
    check(seer, row, [*text, 2, 9], numbers)
    check_integrity(served.cache)


@pytest.mark.parametrize("seed", range(3))
def test_scores_do_not_depend_on_company_order_or_history(seer: Seer, seed: int) -> None:
    """Pieces, rewinds, samples of one prompt and other pictures in equal placeholders.

    The client does as told: it goes on from what is held.
    """
    rng = random.Random(seed)
    served = engine(
        seer,
        [0, 1, 2, 3],
        slots=700 if seed else 2048,
        max_sessions=5,
        pass_tokens=rng.choice([16, 64, 512]),
        prefill_tokens=rng.choice([16, 40, 256]),
    )
    prompts = {numbers: seer.text(list(numbers)) for numbers in ((), (0,), (3,), (2, 0, 1))}
    whole: dict[str, list[int]] = {}
    shown: dict[str, tuple[int, ...]] = {}
    held: dict[str, int] = {}
    checked = 0
    for _ in range(25):
        rows = []
        for name in rng.sample("abcdef", rng.randrange(1, 4)):
            if name not in whole or rng.random() < 0.2:
                shown[name] = rng.choice(list(prompts))
                whole[name] = prompts[shown[name]] + [rng.randrange(4) for _ in range(4)]
                held[name] = 0
            elif rng.random() < 0.2:
                held[name] = rng.randrange(held[name] + 1)  # rewound
            if held[name] == len(whole[name]):
                whole[name] = [*whole[name], rng.randrange(6)]
            start, most = held[name], rng.choice([1, 5, 40, 500, 500, 500])
            told = whole[name][start : start + most]
            pictures = digests(list(shown[name])) if start == 0 else []
            rows.append(Row(name, start, told, rng.sample(range(6), 3), pictures=pictures))
        served.run(Job(rows))
        for row in rows:
            assert row.refused is None
            held[row.name] = row.held
            if np.isnan(row.logits).all():
                continue
            text = whole[row.name][: row.held]
            check(seer, row, text, list(shown[row.name]))
            checked += len(row.candidates)
        check_integrity(served.cache)
    assert checked > 20


@pytest.mark.parametrize("name", ["llava", "qwen3-vl", "gemma3"])
def test_lookahead_behind_pictures(name: str, tmp_path: Path) -> None:
    seer, numbers = Seer.of(name, tmp_path, lookahead=5), [2, 0]
    served, text = engine(seer, numbers), seer.text(numbers)
    row = Row("a", 0, text, [1], 5, pictures=digests(numbers))
    served.run(Job([row]))
    assert seer.value.lookahead
    with torch.inference_mode():
        expected = seer.value.lookahead(seer.plain(text, numbers)[-1])
    np.testing.assert_allclose(row.lookahead, expected, atol=1e-4, rtol=0)
    check(seer, row, text, numbers)


def test_equal_pictures_share_slots_and_others_do_not(seer: Seer) -> None:
    """Samples of a prompt, its next turn, and a picture of the same size."""
    numbers = [0, 3]  # whose sizes are the same
    served, text = engine(seer, numbers), seer.text([0])
    assert text == seer.text([3])
    shown = {"a": 0, "b": 0, "c": 3}
    rows = {name: Row(name, 0, text, [1], pictures=digests([n])) for name, n in shown.items()}
    served.run(Job([rows["a"]]))
    before = served.forwarded
    served.run(Job([rows["b"]]))
    assert served.forwarded == before
    served.run(Job([rows["c"]]))
    check(seer, rows["c"], text, [3])
    assert abs(rows["c"].logits - rows["a"].logits).max() > 1e-3
    served.run(Job([], closed=["a", "b", "c"]))
    before = served.forwarded
    row = Row("next turn", 0, [*text, 7, 8], [2], pictures=digests([0]))
    served.run(Job([row]))
    assert served.forwarded - before == 3
    check(seer, row, [*text, 7, 8], [0])
    check_integrity(served.cache)
