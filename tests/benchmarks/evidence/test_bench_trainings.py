"""Predictions with intervals, and grids of small trainings that are stopped and go on."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.evidence import ablations, censoring, prediction, scaling
from benchmarks.evidence.ablations import runs_of
from benchmarks.evidence.grid import Grid
from benchmarks.evidence.prediction import intervals
from benchmarks.evidence.scaling import subset
from benchmarks.evidence.small import SmallBackbone, SmallLora, SmallRecipe, SmallTraining
from benchmarks.figures import read_figures
from tests.support.tiny_llm import tiny_llm
from tests.support.training import row, write
from trainer.data import Rollout
from trainer.evaluation.figures import predicted, summarise
from trainer.reading import Reading
from trainer.rollout_files import read_rollouts

GAMMA = 0.99
TINY = SmallRecipe(max_steps=2, tokens_per_step=128, max_length=128, warmup_steps=1, bf16=False)


def rollouts(prompts: int, samples: int = 2) -> list[Rollout]:
    chance = np.random.default_rng(0)
    return [
        Rollout(
            f"p{i}",
            ("math", "code")[i % 2],
            chance.integers(0, 256, 4),
            chance.integers(0, 256, chance.integers(3, 40)),
            finished=bool(chance.random() < 0.8),
        )
        for i in range(prompts)
        for _ in range(samples)
    ]


def test_figures_are_those_of_lenvm_evaluate() -> None:
    texts = rollouts(20)
    chance = np.random.default_rng(1)
    logits = [chance.normal(0, 1, 4 + len(r.completion_ids)) for r in texts]
    told = predicted(texts, logits, GAMMA, 64)
    mine, theirs = intervals(told, GAMMA), summarise(told, GAMMA)
    for name in ("mre", "relative_error_of_u"):
        for domain, mre in theirs[name].items():
            figure = mine[f"{name} {domain}"]
            assert figure.value == pytest.approx(mre)
            assert figure.low < figure.value < figure.high
            assert figure.n == 10
    for name in ("median_error", "rank_correlation"):
        assert mine[name].value == pytest.approx(theirs[name]["all"])
        assert mine[name].low < mine[name].value < mine[name].high
        assert mine[name].n == 20
    assert mine["r2"].value == pytest.approx(theirs["r2"])
    assert mine["loss"].low < mine["loss"].value < mine["loss"].high


# ---- grids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With model/ and rollouts.parquet."""
    folder = tmp_path_factory.mktemp("grid")
    tiny_llm(folder / "model")
    rows = [
        row(0, r.prompt_ids.tolist(), r.completion_ids.tolist(), "stop" if r.finished else "length")
        | {"prompt_id": r.prompt_id, "domain": r.domain}
        for r in rollouts(60)
    ]
    write(folder / "rollouts.parquet", rows)
    return folder


def prompts_of(path: Path) -> list[str]:
    return list(map(str, pq.read_table(path)["prompt_id"].to_pylist()))


def test_smaller_data_are_part_of_larger_ones(folder: Path, tmp_path: Path) -> None:
    source = folder / "rollouts.parquet"
    half, quarter = (subset(source, s, None, tmp_path / f"{s}.parquet") for s in (0.5, 0.25))
    assert {*prompts_of(quarter)} < {*prompts_of(half)} < {*prompts_of(source)}
    single = prompts_of(subset(source, 1.0, 1, tmp_path / "single.parquet"))
    assert sorted(single) == sorted({*prompts_of(source)})


def grid_of(folder: Path, layers: int = 1) -> Grid:
    backbone = SmallBackbone(model=str(folder / "model"), num_layers=layers)
    training = SmallTraining(backbone=backbone, recipe=TINY, holdout=0.2)
    return Grid(rollouts=folder / "rollouts.parquet", training=training)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


@pytest.mark.parametrize("benchmark", [ablations, censoring, scaling])
def test_an_option_that_is_given_leaves_the_others_small(benchmark: Any) -> None:
    where = ["--rollouts", "r", "--model", "m"]
    _, bound, _ = benchmark.app.parse_args([*where, "--max-steps", "3", "--lora.alpha", "8"])
    training = bound.arguments["grid"].training
    assert training.recipe == SmallRecipe(max_steps=3)
    assert training.backbone == SmallBackbone(model="m", lora=SmallLora(alpha=8))
    assert training.holdout == 0.1


def test_scaling_goes_on_and_its_checkpoints_are_compared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> dict[str, Any]:
        scaling.main(
            grid=grid_of(folder), depths=(1, 2), shares=(0.5,), samples=(), output=tmp_path
        )
        return last_line(capsys)

    first = run()
    settings = [(row["axis"], row["setting"]) for row in first["runs"]]
    assert settings == [("layers", "1"), ("layers", "2"), ("prompts", "50%")]
    assert len({row["figures"]["loss"]["n"] for row in first["runs"]}) == 1  # the same prompts
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/value_head.safetensors")}
    assert len(weights) == 3
    shutil.rmtree(tmp_path / "layers-2")
    (tmp_path / "layers-1" / "figures.json").unlink()  # trained, and killed before the figures
    assert run() == first
    again = {path.parent.name for path in weights if path.stat().st_mtime_ns != weights[path]}
    assert again == {"layers-2"}

    checkpoints = (tmp_path / "layers-2", tmp_path / "layers-1")
    reading = Reading(base_model=str(folder / "model"), dtype="float32")
    where = {"rollouts": folder / "rollouts.parquet", "reading": reading}
    output = tmp_path / "prediction"
    prediction.main(checkpoint=checkpoints, output=output, **where)
    told = capsys.readouterr().out
    result = json.loads(told.splitlines()[-1])
    models = result["models"]
    assert {*result["positions"]} == {*models}
    assert {row["gamma"] for row in result["inversion"]["measured"]} > {0.98, 0.999}
    assert {*result["tokens"]} == {"lengthen", "shorten"}
    assert all(f"{caption}:" in told for caption in prediction.tables(read_figures(output)))
    assert list(models)[:2] == ["layers-2", "layers-1"]
    assert {"training mean", "prompt length"} < models.keys()
    assert {
        *("mre code", "mre math", "relative_error_of_u code", "relative_error_of_u math"),
        *("median_error", "rank_correlation", "loss", "r2"),
    } == models["layers-1"].keys()
    with pytest.raises(ValueError, match=r"checkpoint: .*different names"):
        prediction.main(checkpoint=(checkpoints[0], tmp_path / "b" / "layers-2"), **where)


def test_ablations_on_one_axis(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablations.main(grid=grid_of(folder), axes=("weighting",), output=tmp_path)
    runs = last_line(capsys)["runs"]
    assert [row["setting"] for row in runs] == ["trajectory"]
    assert all(np.isfinite(row["figures"]["loss"]["value"]) for row in runs)


def test_each_ablation_changes_one_thing() -> None:
    grid = grid_of(Path("r"))
    runs = runs_of(grid, ablations.AXES, 100.0)
    assert len({run.name for run in runs}) == len(runs)
    assert {run.axis for run in runs} == {*ablations.AXES}
    for run in runs[1:]:
        run.training.objective.check()
        run.training.recipe.check()
        different = [
            name
            for part in ("backbone", "objective", "recipe")
            for name, value in vars(getattr(run.training, part)).items()
            if value != getattr(getattr(grid.training, part), name)
        ]
        assert different[0].startswith(run.axis.split()[0]) or run.axis == "precision"
        assert len(different) == (2 if run.setting == "length" else 1)


def test_settings_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    grid = grid_of(folder)
    with pytest.raises(ValueError, match=r"depths: \(3,\), must be within 1 to 2"):
        scaling.main(grid=grid, depths=(3,))
    with pytest.raises(ValueError, match="axes: 'size', must be one of reference"):
        ablations.main(grid=grid, axes=("size",))
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"^share: {share}, must be between"):
            censoring.main(grid=grid, share=share)


def test_a_third_is_cut_and_the_rest_is_as_it_was(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet", [row(i, [7, i], [*range(i), 256]) for i in range(30)])
    limit = censoring.cut_rollouts(source, 1 / 3, tmp_path / "cut.parquet")
    schemas = [pq.read_schema(path) for path in (source, tmp_path / "cut.parquet")]
    assert schemas[0].equals(schemas[1], check_metadata=True)  # whose token ids they are, too
    pairs = zip(read_rollouts(source), read_rollouts(tmp_path / "cut.parquet"), strict=True)
    assert limit == 20
    for before, after in pairs:
        assert after.completion_ids.tolist() == before.completion_ids[:limit].tolist()
        assert after.finished == (len(before.completion_ids) <= limit)
        assert after.prompt_id == before.prompt_id


def test_each_treatment_of_cut_texts_is_judged_on_whole_ones(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the second trains nothing
        censoring.main(grid=grid_of(folder), output=tmp_path)
        *table, last = capsys.readouterr().out.splitlines()
        weights = {path.stat().st_mtime_ns for path in tmp_path.glob("*/value_head.safetensors")}
    assert len(weights) == 4
    runs = {row["setting"]: row for row in json.loads(last)["runs"]}
    assert list(runs) == ["drop", "bound", "bootstrap", "prompt"]
    assert runs["drop"]["cut"] == 0 < runs["bound"]["cut"]
    assert runs["bound"]["completions"] == runs["bootstrap"]["completions"]
    assert len({row["figures"]["loss"]["n"] for row in runs.values()}) == 1
    assert f"| censored | bound | {runs['bound']['completions']} |" in table[-3]
