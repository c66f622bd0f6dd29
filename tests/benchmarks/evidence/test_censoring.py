"""The comparison of treatments: rollouts cut where the truth is known, and a whole run."""

import json
from pathlib import Path

import pytest

from benchmarks.evidence.censoring import cut_rollouts, main
from benchmarks.evidence.small import SmallLora, SmallRecipe
from tests.support.tiny_llm import tiny_llm
from tests.trainer.training.test_train import row, write
from trainer.data import read_rollouts


def rollouts(path: Path) -> Path:
    """Lengths 1 to 30."""
    return write(path, [row(i, [7, i], [*range(i), 256]) for i in range(30)])


def test_a_third_is_cut_and_the_rest_is_as_it_was(tmp_path: Path) -> None:
    source = rollouts(tmp_path / "a.parquet")
    limit = cut_rollouts(source, 1 / 3, tmp_path / "cut.parquet")
    pairs = zip(read_rollouts(source), read_rollouts(tmp_path / "cut.parquet"), strict=True)
    assert limit == 20
    for before, after in pairs:
        assert after.completion_ids.tolist() == before.completion_ids[:limit].tolist()
        assert after.finished == (len(before.completion_ids) <= limit)
        assert after.prompt_id == before.prompt_id


def test_each_treatment_is_trained_and_judged_on_whole_completions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, base = rollouts(tmp_path / "a.parquet"), tiny_llm(tmp_path / "base")
    recipe = SmallRecipe(max_steps=1, max_length=64, tokens_per_step=64, bf16=False, warmup_steps=0)
    for _ in range(2):  # the second trains nothing
        main(
            rollouts=source,
            model=str(base),
            num_layers=1,
            lora=SmallLora(rank=2),
            recipe=recipe,
            holdout=0.3,
            output=tmp_path / "out",
        )
    printed = capsys.readouterr()
    assert printed.err.count("finished before") == 4
    *table, last = printed.out.splitlines()
    result = json.loads(last)
    assert result["limit"] == 20
    treatments = result["treatments"]
    assert list(treatments) == ["drop", "bound", "bootstrap", "prompt"]
    assert treatments["drop"]["cut"] == 0 < treatments["bound"]["cut"]
    assert treatments["bound"]["completions"] == treatments["bootstrap"]["completions"]
    assert f"| bound | {treatments['bound']['completions']} |" in table[-3]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_cuts_nothing_or_all(share: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^share: {share}, must be between"):
        main(rollouts=tmp_path, model="m", share=share)
