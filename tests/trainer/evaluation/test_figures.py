"""Figures of an evaluation from logits made by hand: of an oracle, and of one that guesses."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support.tiny import GAMMA
from trainer.data import Rollout
from trainer.evaluation import baselines
from trainer.evaluation.baselines import baseline_logits, fit_baselines
from trainer.evaluation.figures import predicted, summarise
from trainer.evaluation.forecasts import rank_correlation
from value_server.contract.values import logit_from_length

MAX_LENGTH = 3000


def rollout(
    name: str, prompt: int, length: int, finished: bool = True, domain: str = "d"
) -> Rollout:
    return Rollout(name, domain, np.arange(prompt), np.arange(length), finished)


def oracle(rollout: Rollout) -> NDArray[np.float32]:
    """Logits of one that knows how long a completion gets; a cut one ends a token later."""
    prompt, length = len(rollout.prompt_ids), len(rollout.completion_ids)
    to_come = torch.arange(prompt + length - 1, -1, -1, dtype=torch.float64)
    z: NDArray[np.float32] = logit_from_length(to_come + (not rollout.finished), GAMMA).numpy()
    return z.astype(np.float32)


def constant(u: float) -> Callable[[Rollout], NDArray[np.float32]]:
    def logits(rollout: Rollout) -> NDArray[np.float32]:
        size = len(rollout.prompt_ids) + len(rollout.completion_ids)
        return np.full(size, np.log(u / (1 - u)), dtype=np.float32)

    return logits


def figures(
    rollouts: list[Rollout],
    predictor: Callable[[Rollout], NDArray[Any]],
    max_length: int = MAX_LENGTH,
) -> dict[str, Any]:
    logits = [predictor(r)[:max_length] for r in rollouts]
    return summarise(predicted(rollouts, logits, GAMMA, max_length), GAMMA)


def baseline(name: str, training: list[Rollout]) -> Callable[[Rollout], NDArray[np.float64]]:
    coefficients = fit_baselines(training, GAMMA, MAX_LENGTH)[name]
    return lambda rollout: baseline_logits(coefficients, rollout, MAX_LENGTH)


def u(length: float) -> float:
    return float(1 - GAMMA**length)


ROLLOUTS = [rollout(str(n), 1 + n % 7, n) for n in (1, 2, 9, 30, 77, 200, 640)]


def test_an_oracle_makes_no_error() -> None:
    result = figures(ROLLOUTS, oracle)
    assert result["mre"]["d"] == pytest.approx(0, abs=1e-5)
    assert result["r2"] == pytest.approx(1, abs=1e-9)
    assert list(result["length_error_by_position"]) == ["0.0", "0.25", "0.5", "0.75"]
    assert list(result["length_error_by_position"].values()) == pytest.approx([0] * 4, abs=1e-4)
    assert (result["prompts"], result["completions"], result["cut"]) == (7, 7, 0)


def test_the_mean_explains_nothing() -> None:
    mean_over_tokens = float(np.mean([u(r) for n in (4, 40, 90) for r in range(1, n + 1)]))
    rollouts = [rollout(str(n), 3, n) for n in (4, 40, 90)]
    assert figures(rollouts, constant(mean_over_tokens))["r2"] == pytest.approx(0, abs=1e-6)


def test_the_training_mean_by_hand() -> None:
    training = [rollout("t", 5, n) for n in (10, 100, 300)]
    mean = float(np.mean([u(n) for n in (10, 100, 300)]))
    result = figures(ROLLOUTS, baseline("training mean", training))
    lengths = (1, 2, 9, 30, 77, 200, 640)
    by_hand = np.mean([abs(mean - u(n)) / u(n) for n in lengths])
    assert result["relative_error_of_u"]["d"] == pytest.approx(by_hand)
    guess = np.log(1 - mean) / np.log(GAMMA)
    in_lengths = [abs(guess - n) / n for n in lengths]
    assert result["mre"]["d"] == pytest.approx(np.mean(in_lengths))
    assert result["median_error"]["d"] == pytest.approx(np.median(in_lengths))
    assert result["rank_correlation"] == {"d": None, "all": None}  # one guess for all
    assert figures(training, baseline("training mean", training))["r2"] == pytest.approx(
        0, abs=0.01
    )


def test_a_line_through_the_prompts_length_finds_a_law_of_that_kind() -> None:
    """u of 0.2·log P: at the boundary exact; within, better than the mean."""
    lengths = {
        p: round(float(np.log(1 - 0.2 * np.log(p)) / np.log(GAMMA))) for p in range(5, 90, 4)
    }
    rollouts = [rollout(str(p), p, n) for p, n in lengths.items()]
    line = figures(rollouts, baseline("prompt length", rollouts))
    mean = figures(rollouts, baseline("training mean", rollouts))
    assert line["mre"]["d"] < 0.05 < mean["mre"]["d"]
    assert line["r2"] > max(mean["r2"], 0.4)


def test_baselines_look_at_cut_completions_at_the_boundary_only() -> None:
    known, cut = rollout("a", 3, 20), rollout("b", 3, 60, finished=False)
    both = fit_baselines([known, cut], GAMMA, MAX_LENGTH)["training mean"]
    assert both["boundary"][0] == pytest.approx((u(20) + u(61)) / 2)
    assert both["tokens"] == fit_baselines([known], GAMMA, MAX_LENGTH)["training mean"]["tokens"]
    assert fit_baselines([cut], GAMMA, MAX_LENGTH) == {}


@pytest.mark.parametrize("prompts", [[3, 9, 40, 7], [5, 5, 5, 5]], ids=["lengths", "one length"])
def test_a_fit_block_by_block_is_the_fit_of_all(
    prompts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no line is the only one: prompts of one length."""
    rollouts = [rollout(str(p), p, 11 + 7 * i, i != 2) for i, p in enumerate(prompts)]
    whole = fit_baselines(rollouts, GAMMA, MAX_LENGTH)
    monkeypatch.setattr(baselines, "HELD", 5)
    parts = fit_baselines(rollouts, GAMMA, MAX_LENGTH)
    for name, of_places in whole.items():
        for place, weights in of_places.items():
            assert parts[name][place] == pytest.approx(weights, abs=1e-9)


def length_of(u: float) -> float:
    return float(np.log(1 - u) / np.log(GAMMA))


def test_a_prompts_truth_is_the_length_of_the_mean_value_of_its_samples() -> None:
    """Paper, Eq. 13 to 15: not the mean length, which is larger (Appendix F)."""
    samples = [rollout("a", 3, 10), rollout("a", 3, 500)]
    truth = (u(10) + u(500)) / 2
    result = figures(samples, constant(0.5))
    in_lengths = abs(length_of(0.5) - length_of(truth)) / length_of(truth)
    assert result["mre"]["d"] == pytest.approx(in_lengths, rel=1e-5)
    assert result["relative_error_of_u"]["d"] == pytest.approx(abs(0.5 - truth) / truth, rel=1e-5)
    assert (result["prompts"], result["completions"]) == (1, 2)
    assert length_of(truth) < 255
    assert result["bias"] == {
        "mean_over_truth": pytest.approx(255 / length_of(truth)),
        "mean_over_forecast": pytest.approx(255 / length_of(0.5), rel=1e-5),
    }


def test_an_error_of_values_flatters() -> None:
    """The bug guarded against: 7% of u called the error of a length that is off by 39%."""
    result = figures([rollout("a", 3, 400)], constant(u(400) * 0.93))
    assert result["relative_error_of_u"]["d"] == pytest.approx(0.07, rel=1e-5)
    assert result["mre"]["d"] == pytest.approx(0.39, abs=0.01)


def test_a_cut_completion_counts_at_its_bound() -> None:
    """20 tokens and at least one more; left out, the prompt would look shorter than it is."""
    samples = [rollout("a", 3, 10), rollout("a", 3, 20, finished=False)]
    truth = length_of((u(10) + u(21)) / 2)
    result = figures(samples, constant(0.5))
    assert result["mre"]["d"] == pytest.approx(abs(length_of(0.5) - truth) / truth, rel=1e-5)
    assert result["bias"]["mean_over_truth"] == pytest.approx((10 + 21) / 2 / truth)
    assert result["cut"] == 1


def test_a_value_that_rounds_to_one_has_a_finite_error() -> None:
    result = figures([rollout("a", 3, 20_000)], constant(0.5), max_length=30_000)
    assert np.isfinite(result["mre"]["d"])


def test_order_is_told_apart_from_size() -> None:
    """Twice the true length has the right order everywhere; ranks that are shared by equals."""

    def twice(rollout: Rollout) -> NDArray[np.float64]:
        length = len(rollout.completion_ids)
        size = len(rollout.prompt_ids) + length
        return np.full(size, float(logit_from_length(torch.tensor(2.0 * length), GAMMA)))

    result = figures(ROLLOUTS, twice)
    assert result["rank_correlation"]["d"] == pytest.approx(1)
    assert result["median_error"]["d"] == pytest.approx(1, rel=1e-3)
    a, b = np.array([1.0, 2, 2, 9]), np.array([4.0, 3, 3, 1])
    assert rank_correlation(a, b) == pytest.approx(-1)
    assert rank_correlation(a, np.array([1.0, 2, 3, 4])) == pytest.approx(0.9486833)
    assert rank_correlation(a, np.ones(4)) is None


def test_a_cut_completion_stays_out_of_the_figures_by_token() -> None:
    known = [rollout("a", 3, 10), rollout("b", 4, 30)]
    cut = [rollout("c", 3, 50, finished=False)]
    alone, both = figures(known, constant(0.4)), figures(known + cut, constant(0.4))
    for name in ("r2", "length_error_by_position"):
        assert both[name] == alone[name]
    assert alone["r2"] == alone["r2_with_bounds"] != both["r2_with_bounds"]


def test_a_bound_errs_only_where_a_prediction_falls_short_of_it() -> None:
    """Against the best of many constants, found by trying."""
    known, cut = [rollout("a", 3, 40), rollout("b", 3, 90)], [rollout("c", 3, 60, finished=False)]

    def error(guess: float) -> float:
        total = sum((u(r) - guess) ** 2 for n in (40, 90) for r in range(1, n + 1))
        return total + sum(max(0, u(r) - guess) ** 2 for r in range(1, 62))

    least = min(map(error, np.linspace(0.001, 0.999, 9999)))
    result = figures(known + cut, constant(0.5))["r2_with_bounds"]
    assert result == pytest.approx(1 - error(0.5) / least, abs=1e-4)

    def oracle_or_more(text: Rollout) -> NDArray[np.float32]:
        return oracle(text) + (0 if text.finished else 3)

    assert figures(known + cut, oracle_or_more)["r2_with_bounds"] == pytest.approx(1, abs=1e-6)


def test_calibration_compares_means_of_values_in_parts_of_equal_size() -> None:
    rollouts = [rollout(str(n), 3, n) for n in (20, 50, 90)]
    exact = figures(rollouts, oracle)["calibration"]
    assert len(exact) == 10
    assert [p["predicted"] for p in exact] == pytest.approx([p["true"] for p in exact], rel=1e-4)
    assert exact == sorted(exact, key=lambda point: point["true"])
    blind = figures(rollouts, constant(u(30)))["calibration"]
    assert {round(point["predicted"], 3) for point in blind} == {30.0}


def test_domains_are_told_apart() -> None:
    short = [rollout(str(n), 2, n, domain="short") for n in (5, 6)]
    long = [rollout(str(n), 2, n, domain="long") for n in (300, 400)]
    both = figures(short + long, constant(0.5))
    for part, name in ((short, "short"), (long, "long")):
        assert both["mre"][name] == figures(part, constant(0.5))["mre"][name]
    assert set(both["mre"]) == {"short", "long"}
    assert set(both["median_error"]) == {"short", "long", "all"}


def test_equal_prompt_ids_of_two_domains_are_two_prompts() -> None:
    rollouts = [rollout("0", 2, 5, domain="a"), rollout("0", 2, 500, domain="b")]
    result = figures(rollouts, oracle)
    assert result["prompts"] == 2
    assert list(result["mre"].values()) == pytest.approx([0, 0], abs=1e-5)


def test_error_by_position_is_in_tokens_of_what_remains() -> None:
    """One that always says 10 of a completion of 40: at its quarters 40, 30, 20, 10 remain."""
    result = figures([rollout("a", 3, 40)], constant(u(10)))
    expected = [30 / 40, 20 / 30, 10 / 20, 0]
    assert list(result["length_error_by_position"].values()) == pytest.approx(expected, abs=1e-5)


def test_a_text_beyond_max_length_is_looked_at_as_far_as_it_goes() -> None:
    result = figures(ROLLOUTS, oracle, max_length=20)
    assert result["mre"]["d"] == pytest.approx(0, abs=1e-5)
    assert result["r2"] == pytest.approx(1, abs=1e-6)
    assert result["prompts"] == 7


def test_a_prompt_beyond_max_length_is_left_out() -> None:
    rollouts = [rollout("a", 3, 10), rollout("b", 30, 10)]
    result = figures(rollouts, oracle, max_length=20)
    assert (result["prompts"], result["completions"]) == (1, 1)
