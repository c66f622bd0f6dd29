"""Figures of an evaluation from logits made by hand: of an oracle, and of one that guesses."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from tests.support.tiny import GAMMA, tiny_checkpoint
from trainer.data import Rollout, make_example, prompt_hashes, read_rollouts
from trainer.evaluation.baselines import baseline_logits, fit_baselines
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.figures import summarise
from trainer.evaluation.predict import predict
from trainer.rollouts.rollout import SCHEMA
from value_server.contract.values import length_from_logit, logit_from_length
from value_server.model.value_model import ValueModel

MAX_LENGTH = 3000
QUIET: dict[str, Any] = {"only_json": True}


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
    return summarise(rollouts, logits, GAMMA, max_length)


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
    by_hand = np.mean([abs(mean - u(n)) / u(n) for n in (1, 2, 9, 30, 77, 200, 640)])
    assert result["mre"]["d"] == pytest.approx(by_hand)
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
    assert line["mre"]["d"] < 0.02 < mean["mre"]["d"]
    assert line["r2"] > max(mean["r2"], 0.4)


def test_baselines_look_at_cut_completions_at_the_boundary_only() -> None:
    known, cut = rollout("a", 3, 20), rollout("b", 3, 60, finished=False)
    both = fit_baselines([known, cut], GAMMA, MAX_LENGTH)["training mean"]
    assert both["boundary"][0] == pytest.approx((u(20) + u(61)) / 2)
    assert both["tokens"] == fit_baselines([known], GAMMA, MAX_LENGTH)["training mean"]["tokens"]
    assert fit_baselines([cut], GAMMA, MAX_LENGTH) == {}


def test_a_prompts_truth_is_the_mean_value_of_its_samples() -> None:
    """Of values, not of lengths: u of the mean length would be another number."""
    samples = [rollout("a", 3, 10), rollout("a", 3, 500)]
    truth = (u(10) + u(500)) / 2
    result = figures(samples, constant(0.5))
    assert result["mre"]["d"] == pytest.approx(abs(0.5 - truth) / truth, rel=1e-5)
    assert (result["prompts"], result["completions"]) == (1, 2)


def test_a_cut_completion_counts_at_its_bound() -> None:
    """20 tokens and at least one more; left out, the prompt would look shorter than it is."""
    samples = [rollout("a", 3, 10), rollout("a", 3, 20, finished=False)]
    truth = (u(10) + u(21)) / 2
    result = figures(samples, constant(0.5))
    assert result["mre"]["d"] == pytest.approx(abs(0.5 - truth) / truth, rel=1e-5)
    assert result["cut"] == 1


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


# --- with a model -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def write(path: Path, count: int, reason: str = "stop", prompt: int = 3) -> Path:
    rows = [
        {
            "prompt_id": str(i),
            "domain": "",
            "prompt": "",
            "prompt_ids": [i] * prompt,
            "completion_ids": [*range(i % 9 + 1), 256],
            "finish_reason": reason,
        }
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return path


def test_predict_gives_the_models_logits(checkpoint: Path) -> None:
    model = ValueModel.load(checkpoint)
    text = rollout("a", 5, 20)
    ids = torch.from_numpy(make_example(text, MAX_LENGTH).input_ids)[None]
    with torch.inference_mode():
        expected = model(ids)[0].numpy()
    np.testing.assert_array_equal(predict(model, text, MAX_LENGTH), expected)
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
    truths = [u(i % 9 + 2) for i in range(20)]
    by_hand = np.mean([abs(0.5 - true) / true for true in truths])
    assert recorded["baseline_mre"][""] == pytest.approx(by_hand)
    given = evaluate(out, data, training=data, only_json=True)
    assert list(given["baselines"]) == ["training mean", "prompt length"]
    assert given["baseline_mre"][""] == min(b["mre"][""] for b in given["baselines"].values())


def test_another_checkpoint_in_the_same_table(checkpoint: Path, tmp_path: Path) -> None:
    """With a gamma of its own: lengths are compared, in the values of the first."""
    data = write(tmp_path / "a.parquet", 9)
    shutil.copytree(checkpoint, tmp_path / "twin")
    result = evaluate(checkpoint, data, compare=[tmp_path / "twin"], dtype="float32", **QUIET)
    assert result["baselines"]["twin"]["mre"][""] == pytest.approx(result["mre"][""])
    assert result["baselines"]["twin"]["r2"] == pytest.approx(result["r2"])
    config = tmp_path / "twin" / "config.json"
    config.write_text(config.read_text().replace(f'"gamma": {GAMMA}', '"gamma": 0.98'))
    other = evaluate(checkpoint, data, compare=[tmp_path / "twin"], dtype="float32", **QUIET)
    alone = ValueModel.load(tmp_path / "twin")
    text = read_rollouts(data)[0]
    length = length_from_logit(torch.from_numpy(predict(alone, text, 99)).double(), 0.98)
    assert other["baselines"]["twin"]["mre"][""] != result["mre"][""]
    expected = summarise([text], [logit_from_length(length, GAMMA).numpy()], GAMMA, 99)
    write(data, 1)
    one = evaluate(checkpoint, data, compare=[tmp_path / "twin"], dtype="float32", **QUIET)
    assert one["baselines"]["twin"]["mre"] == pytest.approx(expected["mre"])


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
    failed = subprocess.run([*command, "--holdout", "2"], capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.splitlines()[-1].startswith("error: holdout: 2.0, must be")


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
