"""Looks at pictures beside the engine: nobody waits for another's."""

import logging
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.blocked import SECONDS
from tests.support.seeing import Seer, ShutSight, digest, digests, file_of
from value_server.engine.batcher import Batcher
from value_server.engine.engine import Engine
from value_server.engine.errors import BusyError, RequestError
from value_server.engine.job import Job, JobResult, Row
from value_server.engine.looker import NICENESS
from value_server.engine.pictures import MOST_FAILURES, MOST_PIXELS, PictureStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("base")


@pytest.fixture
def seer(folder: Path) -> Seer:
    return Seer.of("llava", folder)


@pytest.fixture
def batcher(seer: Seer) -> Iterator[Batcher]:
    batcher = Batcher(Engine(seer.value, slots=512))
    batcher.start()
    yield batcher
    batcher.stop()


def look(batcher: Batcher, number: int) -> "Future[None]":
    assert batcher.looker
    return batcher.looker.look(digest(number), file_of(number), MOST_PIXELS)


def store_of(batcher: Batcher) -> PictureStore:
    assert batcher.engine.showing
    return batcher.engine.showing.store


def ask(batcher: Batcher, name: str, text: list[int], *numbers: int) -> tuple[Row, JobResult]:
    row = Row(name, 0, text, [1, 2], pictures=digests(list(numbers)))
    return row, batcher.submit(Job([row])).result(SECONDS)


def test_steps_go_on_while_the_model_looks(seer: Seer, batcher: Batcher) -> None:
    """A text whose picture is being looked at is one whose picture has not come."""
    text = seer.text([0])
    sight = ShutSight(seer)
    seen = look(batcher, 0)
    sight.wait_for_look()
    other, _ = ask(batcher, "other", [5, 6])
    np.testing.assert_allclose(other.logits, [seer.z([5, 6, c], []) for c in (1, 2)], atol=1e-4)
    row, answer = ask(batcher, "a", text, 0)
    assert (answer.held, answer.pending, answer.refused) == ([0], 1, {})
    assert not seen.done()
    assert batcher.works
    sight.open()
    seen.result(SECONDS)
    row, _ = ask(batcher, "a", text, 0)
    np.testing.assert_allclose(row.logits, [seer.z([*text, c], [0]) for c in (1, 2)], atol=1e-4)


def test_looks_and_passes_at_the_same_time(seer: Seer, batcher: Batcher) -> None:
    """Both have the values that each has alone."""
    numbers = range(6)
    texts = {number: seer.text([number]) for number in numbers}
    looks = [look(batcher, number) for number in numbers]
    rows = []
    while len(rows) < 3 or not all(each.done() for each in looks):
        text = [5, 6, len(rows) % 100, len(rows) // 100]
        name = f"text {len(rows) % 8}"  # many sessions in use would leave the pictures no slots
        rows.append((text, ask(batcher, name, text)[0]))
    for text, row in rows[:: 1 + len(rows) // 50]:
        plain = [seer.z([*text, c], []) for c in (1, 2)]
        np.testing.assert_allclose(row.logits, plain, atol=1e-4)
    for number in numbers:
        row, _ = ask(batcher, f"picture {number}", texts[number], number)
        expected = [seer.z([*texts[number], c], [number]) for c in (1, 2)]
        np.testing.assert_allclose(row.logits, expected, atol=1e-4)


def test_a_look_that_fails_is_told_once_and_tried_a_few_times(
    seer: Seer, batcher: Batcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text, sight = seer.text([0]), seer.value.sight
    assert sight
    own, store = sight.tower.get_image_features, store_of(batcher)

    def fail(**_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sight.tower, "get_image_features", fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(MOST_FAILURES):
            assert store.problem(digest(0)) is None
            with pytest.raises(RequestError, match="the model cannot see it: out of memory"):
                look(batcher, 0).result(SECONDS)
    assert caplog.text.count("cannot be seen") == 1
    assert "cannot see it: out of memory" in str(store.problem(digest(0)))
    _, answer = ask(batcher, "a", text, 0)
    assert "one cannot be seen" in str(answer.refused[0])
    monkeypatch.setattr(sight.tower, "get_image_features", own)
    look(batcher, 1).result(SECONDS)  # no other is touched by it
    assert np.isfinite(ask(batcher, "b", seer.text([1]), 1)[0].logits).all()


def test_who_leaves_takes_along_what_has_not_begun(seer: Seer, batcher: Batcher) -> None:
    """What has is looked at to its end, and not again for the next who asks."""
    sight = ShutSight(seer)
    begun, waiting = look(batcher, 0), look(batcher, 1)
    sight.wait_for_look()
    assert waiting.cancel()
    assert not begun.cancel()
    again = look(batcher, 0)
    sight.open()
    again.result(SECONDS)
    assert [store_of(batcher).has(digest(number)) for number in (0, 1)] == [True, False]
    assert sight.looks == 1


def test_the_end_waits_for_no_look(seer: Seer, batcher: Batcher) -> None:
    sight = ShutSight(seer)
    looks = [look(batcher, number) for number in range(2)]
    sight.wait_for_look()
    batcher.drain()
    with pytest.raises(BusyError, match="shutting down"):
        look(batcher, 2)
    batcher.stop()
    sight.open()  # the tower itself is still before it, and is not gone through
    for each in looks:
        with pytest.raises(BusyError, match="shutting down"):
            each.result(SECONDS)
    assert sight.looks == 1
    assert len(store_of(batcher)) == 0


def test_looks_stand_back(seer: Seer) -> None:
    """Half of the engine's threads, and a lower priority; the engine keeps its own."""
    found: dict[str, tuple[int, int]] = {}

    def note(name: str) -> None:
        found[name] = torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, 0)

    assert seer.value.sight
    seer.value.sight.tower.register_forward_pre_hook(lambda *_: note("look"))
    for module in seer.value.sight.tower.children():
        module.register_forward_pre_hook(lambda *_: note("look"))
    seer.value.head.register_forward_pre_hook(lambda *_: note("pass"))
    before, own = torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, 0)
    try:
        torch.set_num_threads(4)
        batcher = Batcher(Engine(seer.value, slots=512))
        look(batcher, 0).result(SECONDS)
        batcher.start()  # behind the look, whose thread has set the number for what comes
        ask(batcher, "a", [5, 6])
        batcher.stop()
    finally:
        torch.set_num_threads(before)
    assert found["pass"] == (4, own)
    assert found["look"] == (2, min(own + NICENESS, 19) if sys.platform == "linux" else own)
