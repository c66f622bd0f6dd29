"""The engine against the naive way: one uncached forward of the whole text per candidate.

Odds of passing by luck: the tiny model's logits of two candidates differ by 0.1 and more, the
tolerance is 1e-4, and each run compares thousands.
"""

import random
import re
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import tiny
from tests.support.slots import check_integrity
from value_server.engine.batcher import Batcher
from value_server.engine.engine import Engine
from value_server.engine.errors import BusyError, ModelError
from value_server.engine.job import Job, Row
from value_server.model.value_model import ValueModel


@pytest.fixture(params=[0, 64], ids=["groups", "alone"], autouse=True)
def both_attentions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows as on a GPU, and short ones as on a CPU."""
    monkeypatch.setattr("value_server.engine.attention.SHORT_QUERIES", request.param)


@pytest.fixture(scope="module")
def reference() -> ValueModel:
    return tiny.tiny_model()


def naive(model: ValueModel, texts: list[list[int]]) -> np.ndarray:
    """Logit at the end of each text, each forwarded alone."""
    with torch.inference_mode():
        return np.array([model(torch.tensor([t]))[0, -1].item() for t in texts])


def engine(**options: Any) -> Engine:
    return Engine(tiny.tiny_model(), **({"slots": 2048} | options))


def run_all(served: Engine, jobs: list[Job]) -> None:
    """All jobs together, pass by pass."""
    for job in jobs:
        served.check(job.rows)
        served.admit(job)
    while not all(served.settle(job) for job in jobs):
        assert served.advance(jobs) > 0
    for job in jobs:
        served.release(job)


def test_a_closed_text_is_continued_without_its_forwards(reference: ValueModel) -> None:
    """Another ending: from 32 tokens before the end of an answer of 300."""
    served, text = engine(), [i % 5 for i in range(300)]
    served.run(Job([Row("answer", 0, text[:40], [1, 2])]))
    for end in range(40, 300):
        served.run(Job([Row("answer", end, [text[end]], [1, 2])]))
    served.run(Job([], closed=["answer"]))
    before = served.forwarded
    begun = text[: 300 - 32]
    z = served.run(Job([Row("ending", 0, begun, [0, 4])])).logits
    assert served.forwarded - before == 2  # its candidates
    np.testing.assert_allclose(z, naive(reference, [[*begun, 0], [*begun, 4]]), atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_scores_do_not_depend_on_company_order_or_history(seed: int, reference: ValueModel) -> None:
    rng = random.Random(seed)
    served = engine(
        slots=200 if seed % 2 else 2048,  # 200: three texts fit, seven do not
        max_sessions=8,
        pass_tokens=rng.choice([16, 64, 512]),
        prefill_tokens=rng.choice([16, 40, 256]),
    )
    texts: dict[str, list[int]] = {}
    without = checked = 0
    for _ in range(60):
        jobs: list[Job] = []
        names = [f"s{i}" for i in rng.sample(range(7), rng.randrange(1, 4))]
        for name in names:
            old = texts.get(name, [])
            if not old or rng.random() < 0.2:
                start, new = 0, [rng.randrange(4) for _ in range(rng.choice([1, 5, 50, 58]))]
            elif rng.random() < 0.2:  # rewind, perhaps to the very same tokens
                start = rng.randrange(len(old) + 1)
                new = old[start:] if rng.random() < 0.5 else [rng.randrange(4)]
            else:  # go on, mostly with a candidate of the last step
                start, new = len(old), [rng.randrange(6)]
            if start + len(new) > 60:
                start, new = 0, [1]
            candidates = rng.sample(range(6), rng.randrange(1, 6))
            jobs.append(Job([Row(name, start, new, candidates)]))
        run_all(served, jobs)
        for job, name in zip(jobs, names, strict=True):
            step, result = job.rows[0], job.answer()
            if result.pending:
                assert np.isnan(result.logits).all()
                texts[name] = texts.get(name, [])[: result.held[0]]
                without += 1
                continue
            texts[name] = texts.get(name, [])[: step.start] + list(step.tokens)
            expected = naive(reference, [[*texts[name], c] for c in step.candidates])
            np.testing.assert_allclose(result.logits, expected, atol=1e-4, rtol=0)
            checked += len(expected)
        check_integrity(served.cache)
    assert checked > 100
    if served.cache.size == 200:
        assert without > 0


def test_bfloat16_is_close() -> None:
    served = Engine(tiny.tiny_model(dtype=torch.bfloat16), slots=512)
    model = tiny.tiny_model(dtype=torch.bfloat16)
    prompt = list(range(40))
    result = served.run(Job([Row("a", 0, prompt, range(20))]))
    expected = naive(model, [[*prompt, c] for c in range(20)])
    np.testing.assert_allclose(result.logits, expected, atol=0.1)


def test_emitted_candidate_is_not_forwarded_again() -> None:
    served = engine()
    served.run(Job([Row("a", 0, [1, 2, 3], [10, 11, 12])]))
    assert served.forwarded == 6
    served.run(Job([Row("a", 3, [11], [20, 21])]))
    assert served.forwarded == 8  # the two candidates alone
    served.run(Job([Row("a", 4, [99], [20, 21])]))
    assert served.forwarded == 11  # 99 was no candidate
    served.run(Job([Row("a", 4, [99], [20, 21])]))
    assert served.forwarded == 11  # a repeated request costs nothing


def test_samples_of_one_prompt_hold_it_once() -> None:
    served = engine()
    jobs = [Job([Row(f"s{i}", 0, [7] * 50, [1, 2])]) for i in range(16)]
    run_all(served, jobs)
    assert served.forwarded == 52
    assert served.cache.used == 52


def test_long_prompt_is_prefilled_in_chunks_and_delays_nobody() -> None:
    served = engine(prefill_tokens=64)
    long, short = Job([Row("l", 0, [3] * 400, [1])]), Job([Row("s", 0, [4], [1, 2])])
    served.admit(long)
    assert served.advance([long]) == 64
    served.admit(short)
    assert served.advance([long, short]) == 67
    assert served.settle(short)
    assert not served.settle(long)


def test_prompt_of_4000_tokens_delays_running_sessions_by_one_chunk_a_pass() -> None:
    """Each step of 8 running sessions takes one pass, and that pass at most one chunk more."""
    served = Engine(tiny.tiny_model(max_position=4096), slots=8192, prefill_tokens=256)
    names = [f"s{i}" for i in range(8)]
    run_all(served, [Job([Row(n, 0, [i, 9], [1, 2])]) for i, n in enumerate(names)])
    long = Job([Row("long", 0, [i % 250 for i in range(4000)], [1, 2])])
    served.admit(long)
    passes = 0
    while not served.settle(long):
        # Alternately an adopted candidate and a token that was none.
        token = 1 if passes % 2 else 3
        steps = [Job([Row(n, 2 + passes, [token], [1, 2])]) for n in names]
        for job in steps:
            served.check(job.rows)
            served.admit(job)
        assert served.advance([long, *steps]) <= 8 * 3 + 256 + 2
        passes += 1
        for job in steps:
            assert served.settle(job)
            assert np.isfinite(job.answer().logits).all()
            served.release(job)
    assert passes == 16  # 15 chunks of 256 and one of 160
    assert np.isfinite(long.answer().logits).all()
    served.release(long)
    check_integrity(served.cache)


def test_prompt_of_more_positions_than_the_model_has_is_refused_at_once() -> None:
    served = Engine(tiny.tiny_model(max_position=4096), slots=8192)
    rows = [
        Row("a", 0, [1] * 4095, [2]),
        Row("b", 0, [1] * 4096),  # no candidate: its values alone
        Row("c", 0, [1] * 4096, [2]),
        Row("d", 4000, [1] * 96, [2]),
    ]
    served.check(rows)
    assert [row.refused is None for row in rows] == [True, True, False, False]
    for row in rows[2:]:
        assert re.search(r"4097 tokens long .* 4096 positions", str(row.refused))


def test_text_values_are_those_of_one_forward(reference: ValueModel) -> None:
    served = engine(prefill_tokens=16)
    ids = [i % 200 for i in range(90)]
    result = served.run(Job([Row("t", 0, ids)], texts=True))
    with torch.inference_mode():
        expected = reference(torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(result.texts[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (Row("a", 0, [258], [1]), "tokens"),
        (Row("a", 0, [1], [-1]), "candidates"),
        (Row("a", 0, [1], [1] * 65), "candidate_counts"),
        (Row("a", 500, [1] * 12, [1]), "tokens"),
    ],
)
def test_impossible_rows_name_their_field_and_concern_no_other(row: Row, field: str) -> None:
    served = engine()
    result = served.run(Job([row, Row("good", 0, [1], [2])]))
    assert {index: error.field for index, error in result.refused.items()} == {0: field}
    assert field in str(result.refused[0])
    assert np.isnan(result.logits[:-1]).all()
    assert np.isfinite(result.logits[-1])
    assert set(served.cache.sessions) == {"good"}


def test_a_row_is_told_how_much_of_its_text_is_here() -> None:
    served = engine()
    result = served.run(Job([Row("a", 0, [1], [2]), Row("b", 5, [1], [2, 3])]))
    assert result.held == [1, 0]
    assert result.pending == 1
    assert np.isfinite(result.logits[0])
    assert np.isnan(result.logits[1:]).all()
    assert served.run(Job([Row("a", 3, [7], [2])])).held == [1]


def test_a_text_that_never_fits_is_refused_and_others_are_served() -> None:
    served = engine(slots=64)
    result = served.run(Job([Row("a", 0, [1] * 70, [2]), Row("b", 0, [1] * 40, [2])]))
    assert "71 slots" in str(result.refused[0])
    assert np.isnan(result.logits[0])
    assert np.isfinite(result.logits[1])
    check_integrity(served.cache)


def test_not_a_number_fails_its_row_only() -> None:
    """A NaN in one session's keys must not reach its neighbours through padding."""
    served = engine()
    with torch.no_grad():
        served.model.backbone.get_input_embeddings().weight[200] = float("nan")
    result = served.run(Job([Row("x", 0, [200] * 9, [1]), Row("y", 0, [5] * 12, [1])]))
    told = {row: str(why) for row, why in result.refused.items()}
    assert told == {0: "the model gave a logit that is not a finite number"}
    assert np.isnan(result.logits[0])
    assert np.isfinite(result.logits[1])
    assert set(served.cache.sessions) == {"y"}
    check_integrity(served.cache)
    again = served.run(Job([Row("z", 0, [6] * 20, [1, 2])]))  # in the slots of the bad one
    assert np.isfinite(again.logits).all()


def test_a_model_that_gives_no_numbers_is_not_served() -> None:
    served = engine(client_slots=64)
    served.warm_up()
    with torch.no_grad():
        served.model.head.register_forward_hook(lambda *given: given[-1] * float("nan"))
    with pytest.raises(ModelError, match="finite"):
        served.warm_up()


def test_batcher_survives_a_failing_forward_and_serves_one_session_in_order(
    reference: ValueModel,
) -> None:
    served = engine()
    batcher = Batcher(served)
    batcher.start()
    try:
        forward, failures = served._forward, [RuntimeError("twice"), RuntimeError("alone")]

        def failing(*given: Any) -> Any:
            if failures:
                raise failures.pop(0)
            return forward(*given)

        served._forward = failing  # type: ignore[method-assign]
        result = batcher.submit(Job([Row("a", 0, [1, 2], [3])])).result(30)
        assert "alone" in str(result.refused[0])
        # Two requests for one session, both waiting: the second builds on the first.
        first = batcher.submit(Job([Row("a", 0, [1, 2], [3])]))
        second = batcher.submit(Job([Row("a", 2, [3], [4])]))
        got = [first.result(30).logits[0], second.result(30).logits[0]]
        np.testing.assert_allclose(got, naive(reference, [[1, 2, 3], [1, 2, 3, 4]]), atol=1e-4)
        check_integrity(served.cache)
    finally:
        batcher.stop()
    with pytest.raises(BusyError):
        batcher.submit(Job([Row("a", 0, [1], [3])]))
