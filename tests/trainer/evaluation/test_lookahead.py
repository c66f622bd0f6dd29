"""Figures of a lookahead head, on values made by hand and of a whole command."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.support.tiny import THINKING, tiny_checkpoint, tiny_model, tiny_tokenizer
from tests.support.training import grouped, row, write
from trainer.evaluation import evaluate as command
from trainer.evaluation.lookahead import NATS, Agreement, compare, tilted
from trainer.lookahead.distil import Scoring
from trainer.reading import Reading
from value_server.model.value_model import ValueModel

CHANCE = np.random.default_rng(0)
SHARES = CHANCE.dirichlet(np.ones(8), 200)
U = CHANCE.random((200, 1)) * 0.8 + CHANCE.random((200, 8)) * 0.2


def test_the_exact_values_agree_with_themselves() -> None:
    found = compare(SHARES, U, U)
    for name in ("r2_within", "r2_within_even", "r2_mean", "correlation", "effect"):
        assert found[name] == pytest.approx(1)
    assert found["exact_moves"] > 0
    assert found["positions"] == 200


def test_the_mean_alone_says_nothing_within_a_step() -> None:
    mean = (SHARES * U).sum(-1, keepdims=True).repeat(8, axis=-1)
    found = compare(SHARES, U, mean + 1e-9 * CHANCE.random((200, 8)))
    assert found["r2_mean"] == pytest.approx(1)
    assert found["r2_within"] == pytest.approx(0, abs=1e-6)
    assert abs(found["effect"]) < 0.2


def test_opposite_differences_move_the_other_way() -> None:
    mean = (SHARES * U).sum(-1, keepdims=True)
    found = compare(SHARES, U, 2 * mean - U)
    assert found["r2_mean"] == pytest.approx(1)
    assert found["r2_within"] == pytest.approx(-3)
    assert found["correlation"] == pytest.approx(-1)
    assert found["effect"] < -0.5


def test_noise_explains_what_its_variance_leaves() -> None:
    noise = CHANCE.standard_normal(U.shape) * 0.03
    found = compare(SHARES, U, U + noise)
    even = U - U.mean(-1, keepdims=True)
    expected = 1 - 0.03**2 * 7 / 8 / np.square(even).mean()
    assert found["r2_within_even"] == pytest.approx(expected, abs=0.03)
    assert 0.5 < found["effect"] < 1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_tilt_is_as_far_as_asked_for(sign: int) -> None:
    """In whichever unit the values are."""
    for scale in (1.0, 1e-4, 1e4):
        q = tilted(SHARES, U * scale, NATS, sign)
        np.testing.assert_allclose(q.sum(-1), 1)
        np.testing.assert_allclose((q * np.log(q / SHARES)).sum(-1), NATS, rtol=1e-3)
        assert (sign * ((q - SHARES) * U).sum(-1) > 0).all()


@pytest.mark.parametrize("positions", [0, 1])
def test_positions_that_cannot_vary_are_refused(positions: int) -> None:
    with pytest.raises(ValueError, match=f"^lookahead_positions: {positions}, must be more"):
        compare(SHARES[:positions], U[:positions], U[:positions])


def test_where_nothing_differs_no_tilt_moves() -> None:
    np.testing.assert_allclose(tilted(SHARES, np.ones_like(U), NATS, 1), SHARES)


def evaluate(checkpoint: Path, rollouts: Path, **options: Any) -> dict[str, Any]:
    options |= {"dtype": "float32", "only_json": True}
    scoring = {n: options.pop(n) for n in ("model", "candidates", "seed") if n in options}
    groups = grouped(options | {"scoring": Scoring(**scoring)}, reading=Reading, ahead=Agreement)
    return command.evaluate(checkpoint, rollouts, **groups)


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [row(i, [i, 1, 2], [*range(i % 9 + 1), 256]) for i in range(12)]
    return write(tmp_path_factory.mktemp("rollouts") / "a.parquet", rows)


def checkpoint(folder: Path, rank: int) -> Path:
    plain = tiny_model()
    lenvm = msgspec.structs.replace(plain.lenvm, lookahead_rank=rank)
    ValueModel(plain.backbone, plain.head, lenvm).save(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_the_command_compares_with_the_same_checkpoint(
    base: Path, rollouts: Path, tmp_path: Path
) -> None:
    own = checkpoint(tmp_path / "own", 4)
    options = {"model": str(base), "lookahead_positions": 1000, "card": True}
    found = evaluate(own, rollouts, **options)["lookahead"]
    places = sum(i % 9 + 2 for i in range(12))
    assert found["positions"] == places
    again = evaluate(own, rollouts, teacher=own, **options)
    assert again["lookahead"] == found
    assert "R² within a step" in (own / "README.md").read_text()
    assert "lookahead" not in evaluate(own, rollouts)


def test_a_teacher_of_another_tokenizer_is_refused(
    base: Path, rollouts: Path, tmp_path: Path
) -> None:
    own = checkpoint(tmp_path / "own", 5)
    teacher = tiny_checkpoint(tmp_path / "teacher", more=THINKING)
    options = {"model": str(base), "lookahead_positions": 10, "candidates": 4}
    with pytest.raises(ValueError, match=f"^teacher: '{teacher}', must be one with the tokenizer"):
        evaluate(own, rollouts, teacher=teacher, **options)


def test_a_checkpoint_without_the_head_is_refused(
    base: Path, rollouts: Path, tmp_path: Path
) -> None:
    own = checkpoint(tmp_path / "own", 0)
    with pytest.raises(ValueError, match=r"^lookahead_positions: 10, must be 0 for a"):
        evaluate(own, rollouts, model=str(base), lookahead_positions=10)
