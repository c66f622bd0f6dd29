"""Errors by position, of u against of lengths, and of tokens: by hand and against naive loops."""

import math

import numpy as np
import pytest
import torch

from benchmarks.estimates import Sample, estimate, median
from benchmarks.evidence.inversion import (
    LENGTHS,
    amplification,
    exact,
    exact_rows,
    inverted,
    measured,
    measured_rows,
)
from benchmarks.evidence.positions import by_position, table_rows
from benchmarks.evidence.tokens import halves, length_tokens
from benchmarks.evidence.tokens import table_rows as token_rows
from tests.support.tiny import tiny_tokenizer
from trainer.data import Rollout
from trainer.evaluation.figures import Predicted, length_errors
from value_server.contract.values import logit_from_length, value_from_length

GAMMA = 0.99


def text(prompt: str, to_come: list[float], ids: list[int] | None = None) -> Predicted:
    """A finished text of as many tokens, with these predictions."""
    count = len(to_come)
    tokens = np.arange(count) if ids is None else np.array(ids)
    rollout = Rollout(prompt, "d", np.array([1, 2]), tokens, finished=True)
    true = torch.arange(count, 0, -1, dtype=torch.float64)
    z = logit_from_length(torch.tensor(to_come, dtype=torch.float64), GAMMA)
    return Predicted(rollout, value_from_length(true, GAMMA).numpy(), z.numpy())


def random_texts(count: int = 30) -> list[Predicted]:
    chance = np.random.default_rng(0)
    sizes = chance.integers(20, 200, count)
    return [text(f"p{i // 2}", list(chance.uniform(1, 200, n))) for i, n in enumerate(sizes)]


# ---- the median of rows in groups


def test_a_median_is_resampled_by_prompts() -> None:
    values, groups = [5.0, 1.0, 2.0, 9.0, 4.0], list("aabcd")
    found = median(Sample(values, groups))
    assert (found.value, found.n, found.groups) == (4.0, 5, 4)
    names = sorted({*groups})
    draws = np.random.default_rng(0).multinomial(4, np.full(4, 0.25), 2000)
    naive = [np.median(np.repeat(values, [d[names.index(g)] for g in groups])) for d in draws]
    assert [found.low, found.high] == pytest.approx(list(np.percentile(naive, [2.5, 97.5])))
    assert math.isnan(median(Sample([], [])).value)


# ---- positions


def test_errors_by_position_are_those_of_lenvm_evaluate() -> None:
    texts = random_texts()
    found = by_position(texts, GAMMA)
    for share, error in length_errors(texts, GAMMA).items():
        assert found[f"{float(share):.0%}"]["relative_error"].value == pytest.approx(error)
    assert found["0%"]["error"].n == 30
    assert found["0%"]["error"].groups == 15
    assert "512" not in found  # no text is as long


def test_errors_after_so_many_tokens_by_hand() -> None:
    """One of the finished texts has 17 tokens: one is to come after 16, and 4 were predicted."""
    long = text("c", [9.0] * 40)
    cut = Predicted(Rollout("c", "d", np.array([1]), np.arange(39), False), long.u, long.z)
    found = by_position([text("a", [*[9.0] * 16, 4.0]), text("b", [8.0] * 8), cut], GAMMA)
    assert found["16"]["error"].value == pytest.approx(3)
    assert found["16"]["relative_error"].value == pytest.approx(3)
    assert found["16"]["error"].n == 1
    assert found["0%"]["error"].value == pytest.approx((8 + 0) / 2)
    relative, absolute, counts = table_rows({"m": found})
    assert relative["16"].value == pytest.approx(300)
    assert absolute["16"].value == pytest.approx(3)
    assert (counts["0%"], counts["16"]) == ("2", "1")


# ---- inversion


def test_the_factor_is_the_derivative_and_least_at_one_unit_of_the_discount() -> None:
    small = 1e-7
    for gamma in (0.98, 0.999):
        for length in LENGTHS:
            factor = float(amplification(np.array(float(length)), gamma))
            assert factor >= math.e
            if factor < 1e4:
                assert inverted(length, small, gamma) == pytest.approx(small * factor, rel=1e-2)
        unit = np.array(-1 / np.log(gamma))
        assert float(amplification(unit, gamma)) == pytest.approx(math.e)


def test_what_no_length_has() -> None:
    assert inverted(1000, 0.01, 0.98) is None  # u would be above 1
    assert inverted(1, -0.5, 0.98) == -1  # u would be below 0
    assert inverted(100, 0.0, 0.99) == pytest.approx(0)
    rows = exact_rows(exact((0.98, 0.999)))
    assert [row["tokens to come"] for row in rows] == [*LENGTHS]
    assert rows[-1]["gamma 0.98"].endswith(", none")


def test_measured_errors_against_a_loop() -> None:
    texts = random_texts()
    rows = measured(texts, GAMMA, (0.98, GAMMA))
    own = next(row for row in rows if (row["gamma"], row["length"]) == (0.98, "17 to 64"))
    of_u, of_length = [], []
    for t in texts:
        for k, z in enumerate(t.z):
            if 17 <= (true := len(t.z) - k) <= 64:
                guess = math.log1p(math.exp(z)) / -math.log(GAMMA)
                of_u.append(abs(0.98**guess - 0.98**true))
                of_length.append(abs(guess - true) / true)
    assert own["error_of_u"].value == pytest.approx(np.mean(of_u))
    assert own["error_of_length"].value == pytest.approx(np.mean(of_length))
    assert own["ratio"].value == pytest.approx(np.mean(of_length) / np.mean(of_u))
    assert (own["error_of_u"].n, own["error_of_u"].groups) == (len(of_u), 15)
    same = [row["error_of_length"] for row in rows if row["length"] == "17 to 64"]
    assert same[0] == same[1]  # lengths are the same under every gamma
    assert len(measured_rows(rows)) == len(rows) == 2 * 3  # none has 257 to come


def test_small_errors_follow_the_law() -> None:
    texts = [text("a", [n + 0.01 for n in range(60, 0, -1)])]
    for row in measured(texts, GAMMA, (GAMMA,)):
        assert row["ratio"].value == pytest.approx(row["ratio_if_small"].value, rel=1e-3)


# ---- tokens


def test_halves_keep_prompts_together() -> None:
    parts = halves(random_texts())
    names = [{t.rollout.prompt_id for t in part} for part in parts]
    assert not names[0] & names[1]
    assert sorted(map(len, names)) == [7, 8]
    assert sum(map(len, parts)) == 30


def test_tokens_are_chosen_by_one_half_and_told_by_the_other() -> None:
    """b lengthens in both halves, less so in the second; c and g shorten in both; d lengthens in
    the first alone."""
    first, second = [40.0, 80.0, 40.0, 95.0, 1.0], [40.0, 60.0, 30.0, 20.0, 1.0]
    ids = [65, 66, 67, 70, 256]
    texts = [text(f"p{i}", second if i % 2 else first, ids) for i in range(8)]
    found = length_tokens(texts, GAMMA, tiny_tokenizer(), min_count=2, min_prompts=4, top=2)
    assert [row["text"] for row in found["lengthen"]] == ["d", "b"]
    assert [row["text"] for row in found["shorten"]] == ["g", "c"]
    d, b = (row["score"] for row in found["lengthen"])
    assert d.value < 0 < b.value < found["lengthen"][1]["chosen_by"]
    assert (b.low, b.high) == pytest.approx((b.value, b.value))  # all are alike
    assert (b.n, b.groups) == (4, 4)
    rare = length_tokens(texts, GAMMA, tiny_tokenizer(), min_count=2, min_prompts=5)
    assert rare == {"lengthen": [], "shorten": []}
    rows = token_rows(found)
    assert rows[0]["token"] == '`"d"`'
    assert rows[1]["score / 0.001"].value == pytest.approx(b.value * 1000)


def test_the_interval_of_a_token_is_near_that_of_a_bootstrap() -> None:
    """One occurrence of b in each of 100 prompts of the second half."""
    chance = np.random.default_rng(1)
    lengths = chance.uniform(60, 120, 200)
    texts = [text(f"p{i:03}", [50.0, n, 1.0], [65, 66, 256]) for i, n in enumerate(lengths)]
    (row,) = length_tokens(texts, GAMMA, tiny_tokenizer(), top=1)["lengthen"]
    u = 1 - GAMMA ** lengths[1::2]
    values = GAMMA * u - (1 - GAMMA**50) + 1 - GAMMA
    whole = estimate(Sample(list(values), [str(i) for i in range(100)]))
    assert (row["text"], row["score"].value) == ("b", pytest.approx(whole.value))
    assert row["score"].high - row["score"].low == pytest.approx(whole.high - whole.low, rel=0.1)
