"""Scores of tokens, from values made by hand."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tiny import GAMMA, tiny_checkpoint
from tests.support.training import grouped, row, write
from trainer.data import Rollout
from trainer.evaluation.figures import predicted
from trainer.evaluation.tokens import TokenScore, step_scores, token_scores, tokens
from trainer.reading import Reading
from value_server.contract.values import logit_from_length


def logits(*lengths: float) -> np.ndarray:
    """Of a text after whose tokens these are to come."""
    return logit_from_length(torch.tensor(lengths, dtype=torch.float64), GAMMA).numpy()


def test_a_token_that_changes_nothing_has_score_0() -> None:
    """It is one token itself: 30 are to come, then 29."""
    np.testing.assert_allclose(step_scores(logits(30, 29, 28, 1), GAMMA)[:2], 0, atol=1e-12)


def test_the_sign_tells_what_a_token_does() -> None:
    longer, shorter = step_scores(logits(30, 60, 10), GAMMA)
    assert longer > 0.1 > -0.1 > shorter
    u = [1 - GAMMA**r for r in (30, 60)]
    assert longer == pytest.approx(GAMMA * u[1] - u[0] + 1 - GAMMA)


def rollout(ids: list[int], finished: bool = True, prompt: str = "p") -> Rollout:
    return Rollout(prompt, "", np.array([1, 2]), np.array(ids), finished)


def scores_of(
    texts: list[Rollout], values: list[np.ndarray], min_count: int = 1, max_length: int = 99
) -> list[TokenScore]:
    return token_scores(predicted(texts, values, GAMMA, max_length), GAMMA, min_count)


def test_scores_belong_to_the_tokens_of_the_completion() -> None:
    """Token 7 doubles, 8 halves; what stands in the prompt, and the end, have no score."""
    finished = rollout([7, 8, 9])
    cut = rollout([8, 7], finished=False, prompt="q")
    values = [logits(5, 40, 80, 40, 1), logits(5, 80, 40, 80)]
    scored = scores_of([finished, cut], values)
    assert [(s.id, s.count, s.prompts) for s in scored] == [(7, 2, 2), (8, 2, 2)]
    up, down = (step_scores(logits(*pair), GAMMA)[0] for pair in ((40, 80), (80, 40)))
    assert [s.score for s in scored] == pytest.approx([up, down])
    assert [s.error for s in scored] == pytest.approx([0, 0], abs=1e-9)


def test_the_standard_error_by_hand() -> None:
    """Of two prompts; what one of them says again and again is no new evidence."""
    texts = [rollout([7, 3]), rollout([7, 3], prompt="q")]
    values = [logits(5, 40, 80, 1), logits(5, 40, 60, 1)]
    (found,) = scores_of(texts, values, min_count=2)
    each = [step_scores(z[1:3], GAMMA)[0] for z in values]
    assert (found.count, found.score) == (2, pytest.approx(np.mean(each)))
    assert found.error == pytest.approx(np.std(each, ddof=1) / np.sqrt(2))
    (tenfold,) = scores_of(texts * 10, values * 10)
    assert (tenfold.count, tenfold.prompts) == (20, 2)
    assert tenfold.error == pytest.approx(found.error)


def test_one_prompt_has_no_standard_error() -> None:
    (found,) = scores_of([rollout([7, 7, 3])], [logits(5, 40, 80, 60, 1)])
    assert (found.count, found.prompts, found.error) == (2, 1, None)


def test_a_text_beyond_max_length_counts_as_far_as_it_goes() -> None:
    scored = scores_of([rollout([7, 8, 7, 9])], [logits(5, 40, 80)], max_length=3)
    assert [(s.id, s.count) for s in scored] == [(7, 1)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    tiny_checkpoint(folder / "checkpoint")
    generator = np.random.default_rng(0)
    texts = [[*generator.integers(65, 91, 30).tolist(), 256] for _ in range(20)]
    write(folder / "a.parquet", [row(i, [1, 2, i], ids) for i, ids in enumerate(texts)])
    return folder


def score(place: Path, **options: Any) -> dict[str, Any]:
    checkpoint = place / "checkpoint"
    # Its base model is nowhere: a checkpoint may bring its own tokenizer.
    options = grouped(options, reading=Reading)
    return tokens(checkpoint, place / "a.parquet", **options)


def test_table_json_and_clouds(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = score(place, top=4, min_count=5, cloud=tmp_path / "c.png")
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == result
    assert len(table) == 2 + 8
    rows = result["lengthen"] + result["shorten"][::-1]
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert f'`"{rows[0]["text"]}"`' in table[2]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_only_what_is_asked_for_needs_wordcloud(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wordcloud", None)
    score(place, min_count=1, limit=2, only_json=True)


def test_prompts_that_were_held_out_alone(place: Path) -> None:
    """About half of 20 prompts, each with 30 tokens."""
    counts = []
    for holdout in (None, 0.5):
        found = score(place, min_count=1, top=99, holdout=holdout, only_json=True)
        counts.append(sum(row["count"] for end in found.values() for row in end))
    assert 0.2 * counts[0] < counts[1] < 0.8 * counts[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("min_count", 0), ("min_count", 10**6), ("top", 0), ("limit", 0)),
        *(("min_prompts", 0), ("min_prompts", 10**6), ("holdout", 1.5), ("cloud", Path("c.txt"))),
    ],
)
def test_a_bad_option_is_named(name: str, value: Any, place: Path) -> None:
    options = {name: value}
    with pytest.raises(ValueError, match=f"^{name}: .*{value}.*, must be "):
        score(place, only_json=True, **options)
