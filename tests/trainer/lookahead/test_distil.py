"""`lenvm distil`, with a tiny teacher and a tiny served model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tiny import GAMMA, THINKING, tiny_checkpoint
from tests.support.tiny_llm import tiny_llm
from tests.support.training import contents, grouped, rollout, row, write
from trainer.candidates import read_candidates, text_key
from trainer.lookahead import distil as command
from trainer.lookahead.distil import Scoring, chosen_positions, passes
from trainer.lookahead.served import ServedModel
from trainer.reading import Reading
from value_server.model.value_model import ValueModel


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine finished texts of 4 to 12 tokens, and a cut one."""
    rows = [row(i, [i, 1, 2], [*range(i + 1), 256]) for i in range(9)]
    folder = tmp_path_factory.mktemp("rollouts")
    return write(folder / "a.parquet", [*rows, row(9, [9], [8, 8], "length")])


def distil(teacher: Path, rollouts: Path, output: Path, base: Path, **options: Any) -> None:
    settings = {"model": str(base), "dtype": "float32", "only_json": True, "candidates": 3}
    groups = grouped(settings | options, scoring=Scoring, reading=Reading)
    command.distil(teacher, rollouts, output, **groups)


def test_all_positions_have_exact_values(
    teacher: Path, rollouts: Path, base: Path, tmp_path: Path
) -> None:
    """Each value as of a text of its own, each probability as the served model has it."""
    distil(teacher, rollouts, tmp_path / "out", base, share=1.0, tokens_per_pass=40)
    found = read_candidates(tmp_path / "out", GAMMA)
    model = ValueModel.load(teacher)
    served = ServedModel(str(base), torch.float32, torch.device("cpu"))
    assert len(found) == 9
    for i in range(9):
        text = np.array([i, 1, 2, *range(i + 1), 256])
        own = found[text_key(text)]
        assert own.positions.tolist() == [*range(2, len(text) - 1)]
        ((ids, p),) = served.candidates([text], [own.positions], 3)
        assert own.ids.tolist() == ids.tolist()
        np.testing.assert_allclose(own.p, p, rtol=1e-4)
        for at, tokens, z in zip(own.positions, own.ids, own.z, strict=True):
            alone = [[*text[: at + 1], token] for token in tokens]
            with torch.inference_mode():
                expected = model(torch.tensor(alone))[:, -1].numpy()
            np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_where_it_was_stopped(
    teacher: Path, rollouts: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole files are kept; other settings are refused by name."""
    monkeypatch.setattr(command, "TEXTS_PER_FILE", 4)
    out = tmp_path / "out"
    distil(teacher, rollouts, out, base, share=0.5)
    whole = contents(out)
    assert len(whole) == 3
    (out / "part-00001.parquet").unlink()
    scored: list[int] = []
    score = command.score

    def counted(teacher: Any, served: Any, texts: Any, *args: Any) -> Any:
        scored.append(len(texts))
        return score(teacher, served, texts, *args)

    monkeypatch.setattr(command, "score", counted)
    distil(teacher, rollouts, out, base, share=0.5)
    assert scored == [4]
    assert contents(out) == whole
    with pytest.raises(ValueError, match=r"^share: .* made with 0.5, this run has 0.6"):
        distil(teacher, rollouts, out, base, share=0.6)


def test_values_of_another_teacher_or_served_model_are_not_kept(
    teacher: Path, rollouts: Path, base: Path, tmp_path: Path
) -> None:
    """Of the same gamma, and wherever the served model is named."""
    out = tmp_path / "out"
    distil(teacher, rollouts, out, base)
    distil(teacher, rollouts, out, base, model=None, base_model=str(base))
    other = tiny_checkpoint(tmp_path / "teacher", seed=1)
    with pytest.raises(ValueError, match=r"^teacher: .* was made with"):
        distil(other, rollouts, out, base)
    served = tiny_llm(tmp_path / "served", seed=1)
    with pytest.raises(ValueError, match=r"^model: .* was made with"):
        distil(teacher, rollouts, out, base, model=None, base_model=str(served))


def test_positions_are_a_share_of_each_text() -> None:
    """From the prompt's last token to the one before the end; the same for the same text."""
    text = rollout(10, 4000)
    for share, low, high in [(0.1, 330, 470), (1.0, 4000, 4000)]:
        chosen = chosen_positions(text, share, 0, 9999)
        assert low <= len(chosen) <= high  # 3.7 standard deviations
        assert chosen[0] >= 9
        assert chosen[-1] <= 4008
        assert (chosen == chosen_positions(text, share, 0, 9999)).all()
    assert chosen_positions(text, 1.0, 0, 100).tolist() == [*range(9, 100)]
    assert len(chosen_positions(text, 1.0, 0, 9)) == 0
    assert set(chosen_positions(text, 0.1, 1, 9999)) != set(chosen_positions(text, 0.1, 0, 9999))


def test_passes_hold_what_fits_and_all_that_have_positions() -> None:
    texts = [np.zeros(n, np.int64) for n in (5, 30, 7, 6)]
    positions = [np.arange(n) for n in (1, 4, 0, 2)]
    found = [*passes(texts, positions, Scoring(candidates=2, tokens_per_pass=20))]
    assert sorted(map(sorted, found)) == [[0, 3], [1]]


@pytest.mark.parametrize(
    ("name", "value"),
    [("share", 0.0), ("share", 1.5), ("candidates", 1), ("tokens_per_pass", 0), ("max_length", 1)],
)
def test_a_bad_argument_is_named_before_any_work(name: str, value: Any, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    with pytest.raises(ValueError, match=f"^{name}: {value!r}, must be "):
        distil(nothing, nothing, tmp_path / "out", nothing, **{name: value})
    assert not list(tmp_path.iterdir())


def test_cut_texts_alone_teach_nothing(teacher: Path, base: Path, tmp_path: Path) -> None:
    cut = write(tmp_path / "a.parquet", [row(0, [1], [2], "length")])
    with pytest.raises(ValueError, match=r"^rollouts: .*with finished completions"):
        distil(teacher, cut, tmp_path / "out", base)


def test_another_tokenizer_is_refused(teacher: Path, rollouts: Path, tmp_path: Path) -> None:
    """Its candidates would be other words to the teacher."""
    served = tiny_llm(tmp_path / "served", more=THINKING)
    with pytest.raises(ValueError, match=f"^model: '{served}', must be one with the tokenizer"):
        distil(teacher, rollouts, tmp_path / "out", served)


def test_a_token_that_the_teacher_does_not_know(teacher: Path, base: Path, tmp_path: Path) -> None:
    rollouts = write(tmp_path / "a.parquet", [row(0, [1, 2], [258, 256])])
    with pytest.raises(ValueError, match=r"^token id: 258, must be below .*'s vocab_size 258"):
        distil(teacher, rollouts, tmp_path / "out", base)


def test_a_broken_file_is_named(teacher: Path, rollouts: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "part-00000.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"part-00000\.parquet: not a readable Parquet file"):
        distil(teacher, rollouts, tmp_path, base)


def test_no_position_at_all_is_no_candidates(
    teacher: Path, rollouts: Path, base: Path, tmp_path: Path
) -> None:
    distil(teacher, rollouts, tmp_path, base, share=1e-9)
    with pytest.raises(ValueError, match=f"^{tmp_path}: holds no candidates"):
        read_candidates(tmp_path, GAMMA)
