"""The guess by a prompt's words: what it can find, and what it must not see."""

from dataclasses import replace

import numpy as np
import pytest

from tests.support.tiny import GAMMA
from trainer.data import Rollout
from trainer.evaluation.boosting import boost
from trainer.evaluation.figures import predicted, summarise
from trainer.evaluation.lexical import features, fit_lexical

MAX_LENGTH = 3000


def rollouts(count: int, seed: int) -> list[Rollout]:
    """Lists are short and stories long, and nothing else tells the length."""
    chance = np.random.default_rng(seed)
    texts = []
    for i in range(count):
        kind, length = (("List", 20), ("Write a story of", 300))[i % 2]
        ids = np.arange(chance.integers(5, 9))
        length += int(chance.integers(0, 10))
        text = f"{kind} things, number {chance.integers(9)}."
        texts.append(Rollout(str(i), "d", ids, np.arange(length), True, prompt=text))
    return texts


def test_boosting_finds_an_interaction_and_does_not_fit_noise() -> None:
    """Exclusive or: no feature alone says anything, and a third one is noise."""
    chance = np.random.default_rng(0)
    x = chance.integers(0, 2, (2000, 3)).astype(float)
    x[:, 0] += 0.2 * (x[:, 1] > 0)  # else no first question would be better than another
    y = (x[:, 0].round() != x[:, 1]).astype(float)
    fitted = boost(x[:1000], y[:1000])
    assert np.mean((fitted(x[1000:]) - y[1000:]) ** 2) < 0.02
    noise = chance.normal(size=1000)
    guess = boost(x[:1000], noise)(x[1000:])
    assert guess.std() < 0.2


def test_the_rows_fitted_have_the_same_predictions_again() -> None:
    """Bins and thresholds agree, also at values on a threshold, and without any feature."""
    x = np.repeat(np.arange(5.0), 40)[:, None]
    y = x[:, 0] ** 2
    assert boost(x, y)(x) == pytest.approx(y, abs=0.5)
    assert boost(np.ones((4, 2)), np.arange(4.0))(np.ones((1, 2))) == pytest.approx([1.5])


def test_words_tell_the_length_of_prompts_that_were_not_seen() -> None:
    words = fit_lexical(rollouts(200, 0), GAMMA, MAX_LENGTH)
    assert words is not None
    fresh = rollouts(40, 1)
    told = predicted(fresh, [words.logits(r, MAX_LENGTH) for r in fresh], GAMMA, MAX_LENGTH)
    figures = summarise(told, GAMMA)
    assert figures["mre"]["d"] < 0.25
    assert figures["rank_correlation"]["d"] > 0.7
    assert figures["r2"] > 0.5
    short = [words.logits(r, 12) for r in fresh]
    assert {len(z) for z in short} == {12}


def test_it_sees_the_prompt_and_how_much_is_written_alone() -> None:
    words = fit_lexical(rollouts(60, 0), GAMMA, MAX_LENGTH)
    assert words is not None
    text = rollouts(1, 3)[0]
    other = replace(text, completion_ids=text.completion_ids[::-1], prompt_id="x", domain="y")
    np.testing.assert_array_equal(words.logits(text, 99), words.logits(other, 99))


def test_without_texts_there_is_none() -> None:
    silent = [replace(r, prompt="") for r in rollouts(9, 0)]
    assert fit_lexical(silent, GAMMA, MAX_LENGTH) is None
    cut = [replace(r, finished=False) for r in rollouts(9, 0)]
    assert fit_lexical(cut, GAMMA, MAX_LENGTH) is None
    assert fit_lexical([], GAMMA, MAX_LENGTH) is None


def test_features_of_any_text_are_finite() -> None:
    for text in ("", "?", "1" * 400, "٣٤ ½ ²", "Warum?\n" * 50):
        assert np.isfinite(features(text, 3)).all()
    assert len(features("", 1)) == len(features("Explain 12 things in 40 words.", 9))
