"""Queries of the lookahead head against the naive way: one uncached forward of the whole text.

Odds of passing by luck: the tiny model's queries of two texts differ by 0.1 and more, the
tolerance is 1e-4, and each run compares hundreds.
"""

import random

import numpy as np
import pytest
import torch

from tests.support import tiny
from tests.support.blocked import SECONDS
from tests.support.slots import check_integrity
from value_server.engine.batcher import Batcher
from value_server.engine.engine import Engine
from value_server.engine.errors import ModelError
from value_server.engine.job import Job, Row
from value_server.engine.keys import lookahead_keys
from value_server.model.lookahead import logits_after
from value_server.model.value_model import ValueModel

RANK = 5


@pytest.fixture(params=[0, 64], ids=["groups", "alone"], autouse=True)
def both_attentions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows as on a GPU, and short ones as on a CPU."""
    monkeypatch.setattr("value_server.engine.attention.SHORT_QUERIES", request.param)


@pytest.fixture(scope="module")
def reference() -> ValueModel:
    return tiny.tiny_lookahead(RANK)


@torch.inference_mode()
def naive(model: ValueModel, text: list[int], candidates: list[int]) -> tuple[np.ndarray, ...]:
    """Query behind the text, and the logits of the candidates, each forwarded alone."""
    state = model.backbone(input_ids=torch.tensor([text])).last_hidden_state[0, -1]
    z = [model(torch.tensor([[*text, c]]))[0, -1].item() for c in candidates]
    assert model.lookahead is not None
    return model.lookahead(state).numpy(), np.array(z)


def engine(**options: int) -> Engine:
    return Engine(tiny.tiny_lookahead(RANK), **({"slots": 2048} | options))  # type: ignore[arg-type]


def asks(name: str, start: int, tokens: list[int], *candidates: int) -> Row:
    return Row(name, start, tokens, candidates, RANK)


def run_all(served: Engine, jobs: list[Job]) -> None:
    """All jobs together, pass by pass."""
    for job in jobs:
        served.check(job.rows)
        served.admit(job)
    while not all(served.settle(job) for job in jobs):
        assert served.advance(jobs) > 0
    for job in jobs:
        served.release(job)


@pytest.mark.parametrize("seed", range(4))
def test_queries_do_not_depend_on_company_order_or_history(
    seed: int, reference: ValueModel
) -> None:
    """Rows of all kinds: both, one of the two or none of query and candidates."""
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
        for name in [f"s{i}" for i in rng.sample(range(7), rng.randrange(1, 4))]:
            old = texts.get(name, [])
            if not old or rng.random() < 0.2:
                start, new = 0, [rng.randrange(4) for _ in range(rng.choice([1, 5, 50, 58]))]
            elif rng.random() < 0.2:  # rewind, perhaps to the very same tokens
                start = rng.randrange(1, len(old) + 1)
                new = old[start:] if rng.random() < 0.5 else [rng.randrange(4)]
            else:  # go on, mostly with a candidate of the last step, or ask again
                start, new = len(old), [rng.randrange(6)] * (rng.random() < 0.8)
            if start + len(new) > 60:
                start, new = 0, [1]
            candidates = rng.sample(range(6), rng.choice([0, 0, 1, 5]))
            closed = [name] if start == 0 and rng.random() < 0.5 else []
            jobs.append(Job([Row(name, start, new, candidates, rng.choice([0, RANK]))], closed))
        run_all(served, jobs)
        for job in jobs:
            row, result = job.rows[0], job.answer()
            assert result.queries.size == (1 + RANK if row.lookahead_rank else 0)
            texts[row.name] = texts.get(row.name, [])[: row.start] + list(row.tokens)
            if result.pending:
                assert np.isnan(result.logits).all()
                assert np.isnan(result.queries).all()
                texts[row.name] = texts[row.name][: result.held[0]]
                without += 1
                continue
            query, z = naive(reference, texts[row.name], list(row.candidates))
            np.testing.assert_allclose(result.logits, z, atol=1e-4, rtol=0)
            if row.lookahead_rank:
                np.testing.assert_allclose(result.queries, query, atol=1e-4, rtol=0)
                checked += 1
        check_integrity(served.cache)
    assert checked > 30
    if served.cache.size == 200:
        assert without > 0


def test_what_is_known_is_told_without_a_pass(reference: ValueModel) -> None:
    """An adopted candidate, the same again, another session, a rewind, a text that was closed."""
    served = engine()
    served.run(Job([Row("a", 0, [1, 2, 3], [10, 11])]))
    for row, text in (
        (asks("a", 3, [11]), [1, 2, 3, 11]),
        (asks("a", 4, []), [1, 2, 3, 11]),
        (asks("b", 0, [1, 2, 3, 11]), [1, 2, 3, 11]),
        (asks("a", 2, []), [1, 2]),
        (asks("b", 0, [1, 2, 3, 11]), [1, 2, 3, 11]),
    ):
        served.run(Job([], closed=["b"]))  # with the last of them nobody but a kept text has it
        result = served.run(Job([row]))
        np.testing.assert_allclose(result.queries, naive(reference, text, [])[0], atol=1e-4)
        assert served.forwarded == 5


def test_one_forward_a_token(reference: ValueModel) -> None:
    served = engine()
    served.run(Job([asks("a", 0, [7] * 40)]))
    for n in range(5):
        result = served.run(Job([asks("a", 40 + n, [n])]))
        assert served.forwarded == 41 + n
    query = naive(reference, [7] * 40 + list(range(5)), [])[0]
    np.testing.assert_allclose(result.queries, query, atol=1e-4)


def test_a_query_that_is_no_number_refuses_its_row_alone(reference: ValueModel) -> None:
    """An exact client of the same text has its logits."""
    served = engine()
    assert served.lookahead is not None
    with torch.no_grad():
        served.lookahead.queries.bias[-1] = float("inf")
    result = served.run(Job([asks("x", 0, [1, 2]), Row("y", 0, [5], [6])]))
    assert {row: type(why) for row, why in result.refused.items()} == {0: ModelError}
    assert np.isnan(result.queries).all()
    np.testing.assert_allclose(result.logits, naive(reference, [5], [6])[1], atol=1e-4)
    with pytest.raises(ModelError, match="finite"):
        served.warm_up()


def test_a_text_of_no_tokens_has_no_query() -> None:
    served = engine()
    result = served.run(Job([asks("a", 0, []), asks("b", 0, [1])]))
    assert {row: why.field for row, why in result.refused.items()} == {0: "tokens"}
    assert np.isnan(result.queries[: 1 + RANK]).all()
    assert np.isfinite(result.queries[1 + RANK :]).all()


def test_an_answer_stays_when_its_slot_goes_to_others() -> None:
    served = engine(slots=8)
    result = served.run(Job([asks("a", 0, [1, 2, 3])]))
    before = result.queries.copy()
    served.cache.close("a", keep=False)
    served.run(Job([asks("b", 0, [9] * 8)]))
    np.testing.assert_array_equal(result.queries, before)


def test_rows_that_are_not_in_time_have_none() -> None:
    batcher = Batcher(engine(), max_waiting=0)
    batcher.start()
    try:
        result = batcher.submit(Job([asks("a", 0, [1], 2)])).result(SECONDS)
    finally:
        batcher.stop()
    assert np.isnan(result.queries).all()
    assert (result.queries.shape, result.logits.shape, result.pending) == ((1 + RANK,), (1,), 1)


def test_queries_and_keys_give_what_the_head_gives(
    reference: ValueModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("value_server.engine.keys.CHUNK", 100)  # of 258 tokens
    lookahead = reference.lookahead
    assert lookahead is not None
    keys = lookahead_keys(reference, lookahead)
    assert (keys.dtype, keys.shape) == (np.float16, (258, RANK))
    served = engine()
    result = served.run(Job([asks("a", 0, [3, 1, 4])]))
    with torch.inference_mode():
        state = reference.backbone(input_ids=torch.tensor([[3, 1, 4]])).last_hidden_state[0, -1]
        embeddings = reference.backbone.get_input_embeddings().weight
        z = logits_after(lookahead(state), lookahead.keys(embeddings)).numpy()
    np.testing.assert_allclose(
        result.queries[0] + keys.astype(np.float32) @ result.queries[1:], z, atol=0.02
    )


def test_a_token_whose_embedding_is_no_number_has_no_key(reference: ValueModel) -> None:
    lookahead, embeddings = reference.lookahead, reference.backbone.get_input_embeddings()
    assert lookahead is not None
    whole = lookahead_keys(reference, lookahead)
    before = embeddings.weight[7].detach().clone()
    with torch.no_grad():
        embeddings.weight[7] = torch.nan
    try:
        keys = lookahead_keys(reference, lookahead)
    finally:
        with torch.no_grad():
            embeddings.weight[7] = before
    assert not keys[7].any()
    np.testing.assert_array_equal(np.delete(keys, 7, 0), np.delete(whole, 7, 0))
