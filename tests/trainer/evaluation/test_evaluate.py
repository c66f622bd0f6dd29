"""`lenvm evaluate`, with tiny models."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tests.support import training as support
from tests.support.tiny import GAMMA, THINKING, tiny_checkpoint
from tests.support.training import grouped, row
from trainer.data import Rollout, make_example
from trainer.digests import prompt_hashes
from trainer.evaluation import evaluate as command
from trainer.evaluation.figures import predicted, summarise
from trainer.evaluation.predict import predict
from trainer.reading import Reading
from trainer.rollout_files import read_rollouts
from value_server.contract.values import length_from_logit, logit_from_length
from value_server.model.value_model import ValueModel


def evaluate(checkpoint: Path, rollouts: Path, **options: Any) -> dict[str, Any]:
    return command.evaluate(checkpoint, rollouts, **grouped(options, reading=Reading))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def write(path: Path, count: int, reason: str = "stop", prompt: int = 3) -> Path:
    rows = [row(i, [i] * prompt, [*range(i % 9 + 1), 256], reason) for i in range(count)]
    return support.write(path, rows)


def test_predict_gives_the_models_logits(checkpoint: Path) -> None:
    model = ValueModel.load(checkpoint)
    text = Rollout("a", "d", np.arange(5), np.arange(20), True)
    ids = torch.from_numpy(make_example(text, 3000).input_ids)[None]
    with torch.inference_mode():
        expected = model(ids)[0].numpy()
    np.testing.assert_array_equal(predict(model, text, 3000), expected)
    np.testing.assert_allclose(predict(model, text, 8), expected[:8], rtol=1e-4, atol=1e-5)


def test_the_last_line_is_the_result(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts = write(tmp_path / "a.parquet", 20)
    result = evaluate(checkpoint, rollouts, holdout=0.5, only_json=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert 0 < result["prompts"] < 20
    everything = evaluate(checkpoint, rollouts, only_json=True)  # the checkpoint records no share
    assert everything["prompts"] == 20


def test_the_share_held_out_comes_from_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    model, rollouts = ValueModel.load(checkpoint), write(tmp_path / "a.parquet", 20)
    model.lenvm = msgspec.structs.replace(model.lenvm, training={"holdout": 0.3})
    model.save(tmp_path / "out")
    recorded = evaluate(tmp_path / "out", rollouts, only_json=True)
    assert recorded == evaluate(checkpoint, rollouts, only_json=True, holdout=0.3)
    assert 0 < recorded["prompts"] < 20


@pytest.mark.parametrize(
    ("options", "rows"),
    [({"holdout": 1e-9}, {}), ({}, {"reason": "length"}), ({"max_length": 2}, {})],
)
def test_nothing_to_evaluate_with(
    options: dict[str, Any], rows: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.parquet", 5, **rows)
    with pytest.raises(ValueError, match=r"^holdout: .* has no finished completion"):
        evaluate(checkpoint, path, only_json=True, **options)


def test_too_few_prompts_are_told(checkpoint: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", 5)
    with pytest.raises(ValueError, match=r"^holdout: .*: 0 of 5 are held out, with 0 finished"):
        evaluate(checkpoint, path, holdout=1e-9, only_json=True)


def test_answers_of_one_token_have_no_r2(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All their values are the same. The last line is JSON, which knows no NaN."""
    path = support.write(tmp_path / "a.parquet", [row(0, [1, 2], [256])])
    page = tmp_path / "page.html"
    result = evaluate(checkpoint, path, html=page, plot=tmp_path / "plot.svg")
    assert (result["r2"], result["r2_with_bounds"]) == (None, None)
    assert "NaN" not in capsys.readouterr().out
    assert page.exists()


def test_baselines_of_a_training_that_was_cut_throughout(checkpoint: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", 5)
    cut = write(tmp_path / "cut.parquet", 5, reason="length", prompt=4)
    result = evaluate(checkpoint, path, training=cut, only_json=True)
    assert result["baselines"] == evaluate(checkpoint, path, only_json=True)["baselines"]


def trained(checkpoint: Path, out: Path, **facts: Any) -> Path:
    """`checkpoint` with other facts of its training."""
    model = ValueModel.load(checkpoint)
    model.lenvm = msgspec.structs.replace(model.lenvm, training=facts)
    model.save(out)
    return out


def test_rollouts_of_other_prompts_are_evaluated_whole(checkpoint: Path, tmp_path: Path) -> None:
    """The bug guarded against: a file of fresh prompts of which 5% are looked at."""
    same, other = write(tmp_path / "a.parquet", 20), write(tmp_path / "b.parquet", 20, prompt=4)
    sketch = prompt_hashes(read_rollouts(same))[3:6]
    out = trained(checkpoint, tmp_path / "out", holdout=0.3, prompt_sketch=sketch)
    assert 0 < evaluate(out, same, only_json=True)["prompts"] < 20
    assert evaluate(out, other, only_json=True)["prompts"] == 20


def test_baselines_come_from_the_checkpoint_or_from_the_rollouts_given(
    checkpoint: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "a.parquet", 20)
    fitted = {"training mean": {"boundary": [0.5, 0, 0], "tokens": [0.5, 0, 0]}}
    out = trained(checkpoint, tmp_path / "out", baselines=fitted)
    recorded = evaluate(out, data, only_json=True)
    assert list(recorded["baselines"]) == ["training mean"]
    guess = np.log(0.5) / np.log(GAMMA)
    by_hand = np.mean([abs(guess - length) / length for length in (i % 9 + 2 for i in range(20))])
    assert recorded["baseline_mre"][""] == pytest.approx(by_hand)
    given = evaluate(out, data, training=data, only_json=True)
    assert list(given["baselines"]) == ["training mean", "prompt length"]
    assert given["baseline_mre"][""] == min(b["mre"][""] for b in given["baselines"].values())


def test_words_are_a_baseline_where_the_training_is_known(checkpoint: Path, tmp_path: Path) -> None:
    """Of the training's prompts alone: nothing is learnt from those that are judged."""
    rows = [
        row(i, [i], [*range(1 + 8 * (i % 2)), 256]) | {"prompt": ("Name it.", "Explain it.")[i % 2]}
        for i in range(60)
    ]
    data = support.write(tmp_path / "a.parquet", rows)
    known = evaluate(checkpoint, data, holdout=0.3, only_json=True)["baselines"]
    words = known["words of the prompt"]
    assert words["mre"][""] < known["training mean"]["mre"][""] / 3
    assert words["rank_correlation"]["all"] > 0.9
    assert "words of the prompt" not in evaluate(checkpoint, data, only_json=True)["baselines"]
    silent = write(tmp_path / "b.parquet", 20)
    told = evaluate(checkpoint, silent, training=data, only_json=True)["baselines"]
    assert "words of the prompt" not in told


def test_another_checkpoint_in_the_same_table(checkpoint: Path, tmp_path: Path) -> None:
    """With a gamma of its own: lengths are compared, in the values of the first."""
    data = write(tmp_path / "a.parquet", 9)
    shutil.copytree(checkpoint, tmp_path / "twin")
    result = evaluate(
        checkpoint, data, compare=[tmp_path / "twin"], dtype="float32", only_json=True
    )
    assert result["baselines"]["twin"]["mre"][""] == pytest.approx(result["mre"][""])
    assert result["baselines"]["twin"]["r2"] == pytest.approx(result["r2"])
    config = tmp_path / "twin" / "config.json"
    config.write_text(config.read_text().replace(f'"gamma": {GAMMA}', '"gamma": 0.98'))
    other = evaluate(checkpoint, data, compare=[tmp_path / "twin"], dtype="float32", only_json=True)
    alone = ValueModel.load(tmp_path / "twin")
    text = read_rollouts(data)[0]
    length = length_from_logit(torch.from_numpy(predict(alone, text, 99)).double(), 0.98)
    assert other["baselines"]["twin"]["mre"][""] != result["mre"][""]
    converted = logit_from_length(length, GAMMA).numpy()
    expected = summarise(predicted([text], [converted], GAMMA, 99), GAMMA)
    write(data, 1)
    one = evaluate(checkpoint, data, compare=[tmp_path / "twin"], dtype="float32", only_json=True)
    assert one["baselines"]["twin"]["mre"] == pytest.approx(expected["mre"])


def test_another_tokenizer_is_not_in_the_same_table(checkpoint: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.parquet", 9)
    other = tiny_checkpoint(tmp_path / "other", more=THINKING)
    with pytest.raises(ValueError, match=f"^compare: '{other}', must be one with the tokenizer"):
        evaluate(checkpoint, data, compare=[other], only_json=True)


def test_a_token_that_the_model_does_not_know_is_named(checkpoint: Path, tmp_path: Path) -> None:
    data = support.write(tmp_path / "a.parquet", [row(0, [1, 2], [258, 256])])
    with pytest.raises(ValueError, match=r"^token id: 258, must be below .*'s vocab_size 258"):
        evaluate(checkpoint, data, only_json=True)
    assert not [*checkpoint.glob("predictions-*")]


def test_table_picture_and_card(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(checkpoint, tmp_path / "out")
    data = write(tmp_path / "a.parquet", 20)
    result = evaluate(out, data, plot=tmp_path / "p.png", card=True)
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == result
    assert [line.split("|")[1].strip() for line in table] == [
        "predictor", "---", "this model", "training mean", "prompt length"
    ]  # fmt: skip
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert "\n".join(table) in card
    assert "20 completions of 20 prompts (a.parquet)" in card
    ValueModel.load(out)


@pytest.mark.e2e
def test_the_module_is_a_command(checkpoint: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.parquet", 4)
    command = [sys.executable, "-m", "trainer", "evaluate", str(checkpoint), str(data), "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = shown.splitlines()
    assert {"mre", "r2", "baseline_mre"} < json.loads(line).keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_length", 1), ("plot", Path("a.txt")), ("plot", Path("b")), ("dtype", "int8")],
)
def test_a_bad_option_is_named(name: str, value: Any, tmp_path: Path) -> None:
    options = {name: value}
    with pytest.raises(ValueError, match=f"^{name}: .*{value}.*, must be"):
        evaluate(tmp_path, tmp_path, **options)


@pytest.mark.parametrize("share", [-0.1, 0.0, 1.1])
def test_a_share_that_is_none(share: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^holdout: {share}, must be"):
        evaluate(tmp_path, tmp_path, only_json=True, holdout=share)
