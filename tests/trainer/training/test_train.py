"""Training: whole runs on a tiny Llama, and runs that were stopped.

The toy task: a token's id is the number of tokens that follow it. The best constant has the
variance of u as its loss; a quarter of that is not reached without reading the tokens.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import trainer.training.train
from tests.support.tiny import GAMMA, tiny_model, tiny_tokenizer
from tests.support.tiny_llm import tiny_llm
from trainer.data import NO_LABEL, PackedDataset, Rollout, collate, make_example
from trainer.evaluation.evaluate import evaluate
from trainer.rollouts.rollout import SCHEMA
from trainer.training.objective import Objective
from trainer.training.recipe import Recipe
from trainer.training.steps import last_step
from trainer.training.train import LoraShape, Tune, train
from trainer.training.value_trainer import ValueTrainer
from value_server.contract.checkpoint import read_config, tokenizer_fingerprint
from value_server.contract.values import length_from_logit
from value_server.model.value_model import ValueModel

TUNES: list[Tune] = ["full", "lora", "head"]
END = 256
LENGTHS = (4, 12, 40)
NAME = "org/tiny"


# --- steps --------------------------------------------------------------------------------


def rollout(prompt: int, completion: int) -> Rollout:
    generator = np.random.default_rng(prompt * 100 + completion)
    ids = generator.integers(0, 256, prompt + completion)
    return Rollout("p", "", ids[:prompt], ids[prompt:], True)


UNEVEN = [make_example(rollout(*sizes), 64) for sizes in [(9, 50), (3, 2), (4, 1), (2, 30)]]


def test_packed_texts_have_the_logits_of_separate_ones() -> None:
    """Two packs of several texts in one row, as a training step sees them."""
    model = tiny_model().train()
    dataset = PackedDataset([make_example(rollout(p, 7), 64) for p in range(1, 9)], 40, seed=0)
    batch = collate([dataset[0], dataset[1]])
    members = [i for members in dataset.packs[:2] for i in members]
    texts = [torch.from_numpy(dataset.examples[i].input_ids)[None] for i in members]
    with torch.inference_mode():
        packed = model(batch["input_ids"], position_ids=batch["position_ids"])
        alone = torch.cat([model(text) for text in texts], dim=1)
    assert len(texts) > 4
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_loss_and_gradient_are_averages_over_all_tokens_of_a_step(tmp_path: Path) -> None:
    """Packs of a step differ in size: a mean of their means would give a token of a short one
    the weight of 25 others. The second step is a part of a step, one pack instead of three.
    """
    model = tiny_model()
    batches: list[dict[str, torch.Tensor]] = []

    def remember(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batches.append(collate(items))
        return batches[-1]

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        learning_rate=0,
        num_train_epochs=1,
        logging_steps=1,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    dataset = PackedDataset(UNEVEN, 64, seed=0)
    dataset.packs = [[i] for i in range(4)]
    value_trainer = ValueTrainer(
        model,
        arguments,
        train_dataset=dataset,
        data_collator=remember,
        objective=Objective(),
        readout=model.lenvm.readout,
    )
    value_trainer.train()
    logs = [entry for entry in value_trainer.state.log_history if "grad_norm" in entry]
    assert len(logs) == 2
    for entry, step in zip(logs, (batches[:3], batches[3:]), strict=True):
        expected = token_average(model, step)
        model.zero_grad()
        expected.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert entry["loss"] == pytest.approx(expected.item(), rel=1e-4)
        assert entry["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def token_average(model: ValueModel, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    losses = []
    for batch in batches:
        labelled = batch["labels"] != NO_LABEL
        u = model(batch["input_ids"])[labelled].sigmoid()
        losses.append((u - (1 - GAMMA ** batch["labels"][labelled])).square())
    return torch.cat(losses).mean()


# --- whole runs ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llm(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "toy.parquet", toy_rows())


def toy_rows(count: int = 48) -> list[dict[str, Any]]:
    lengths = [LENGTHS[number % len(LENGTHS)] for number in range(count)]
    return [row(i, [255, 255, n], [*range(n - 1, 0, -1), END]) for i, n in enumerate(lengths)]


CONSTANT_LOSS = np.var([1 - 0.01 ** (r / 40) for n in LENGTHS for r in range(1, n + 1)])


def row(number: int, prompt: list[int], completion: list[int], reason: str = "stop") -> Any:
    return {
        "prompt_id": str(number),
        "domain": "",
        "prompt": "",
        "prompt_ids": prompt,
        "completion_ids": completion,
        "finish_reason": reason,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return path


def run(data: Path, output: Path, base: Path, **options: Any) -> None:
    """Five steps of three packs."""
    settings: dict[str, Any] = {
        "tune": "head",
        "holdout": 0.0,
        "learning_rate": 1e-3,
        "max_steps": 5,
        "tokens_per_step": 192,
        "max_length": 64,
        "warmup_steps": 0,
        "save_steps": 2,
        "bf16": False,
        "base_model": NAME,
        "lora": LoraShape(rank=4, alpha=8),
    }
    settings |= options
    for name, kind in (("objective", Objective), ("recipe", Recipe)):
        own = {field.name for field in fields(kind)} & settings.keys()
        settings[name] = kind(**{field: settings.pop(field) for field in own})
    train(data, output, model=str(base), **settings)


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The log of the last run."""
    log: list[dict[str, Any]] = []

    class Recorded(ValueTrainer):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            log.append(dict(logs))
            super().log(logs, *args, **kwargs)

    monkeypatch.setattr(trainer.training.train, "ValueTrainer", Recorded)
    return log


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(("tune", "layers"), [("full", None), ("lora", 1), ("head", 1)])
def test_a_run_ends_with_a_checkpoint_that_loads(
    tune: Tune,
    layers: int | None,
    base: Path,
    data: Path,
    tmp_path: Path,
    history: list[dict[str, Any]],
) -> None:
    out = tmp_path / "out"
    run(data, out, base, tune=tune, num_layers=layers, learning_rate=3e-3, max_steps=24)

    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 24
    assert losses[0] > CONSTANT_LOSS
    assert max(losses[-3:]) < CONSTANT_LOSS / 4

    model = ValueModel.load(out, str(base))
    assert model.config.num_hidden_layers == (layers or 2)
    with torch.inference_mode():
        values = [model(torch.tensor([[255, 255, n]]))[0, -1].item() for n in LENGTHS]
    assert values == sorted(values)

    files = contents(out)
    assert {Path(name).suffix for name in files} == {".json", ".safetensors", ".md"}
    assert not any(str(place).encode() in c for c in files.values() for place in (base, tmp_path))
    config = read_config(out)
    assert config.base_model == NAME
    assert config.tokenizer_fingerprint == tokenizer_fingerprint(tiny_tokenizer())
    assert config.training["completions"] == 48
    if tune == "lora":
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == NAME


def test_gamma_comes_from_the_99th_percentile_of_finished_lengths(
    base: Path, tmp_path: Path
) -> None:
    """A hundred of length 3 to 102, of which 101.01 is the percentile; cut ones do not count."""
    rows = [row(i, [1], [2] * (i + 3)) for i in range(100)]
    cut = [row(i, [1], [2] * 300, "length") for i in range(50)]
    run(write(tmp_path / "a.parquet", rows + cut), tmp_path / "out", base, max_steps=1)
    assert 1 - read_config(tmp_path / "out").gamma ** 101.01 == pytest.approx(0.99)


def test_a_gamma_of_ones_own(base: Path, data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out", base, gamma=0.9, max_steps=1)
    assert read_config(tmp_path / "out").gamma == 0.9


def test_cut_completions_are_bounds_or_nothing(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def keep(examples: Any, *args: Any, **options: Any) -> PackedDataset:
        seen.append(examples)
        return PackedDataset(examples, *args, **options)

    monkeypatch.setattr(trainer.training.train, "PackedDataset", keep)
    rows = [*toy_rows(6), *(row(i, [1], [2] * 9, "length") for i in range(4))]
    path = write(tmp_path / "a.parquet", rows)
    for censored in ("drop", "bound", "prompt"):
        run(path, tmp_path / censored, base, censored=censored, max_steps=1)
    assert [e.is_cut for e in seen[0]] == [False] * 6
    for examples, size in ((seen[1], 10), (seen[2], 1)):  # of a prompt of one token
        assert [e.is_cut for e in examples] == [False] * 6 + [True] * 4
        assert {len(e.input_ids) for e in examples[6:]} == {size}
        assert [e.labels[0] for e in examples[6:]] == [10.0] * 4
    facts = [read_config(tmp_path / name).training for name in ("drop", "bound", "prompt")]
    assert [(f["completions"], f["cut"]) for f in facts] == [(6, 0), (10, 4), (10, 4)]


@pytest.mark.parametrize(
    "choice",
    [
        {"loss": "huber"},
        {"loss": "bce"},
        {"weighting": "trajectory"},
        {"prompt_weight": 2.0},
        {"batches": "grouped"},
        {"gae_lambda": 0.9},
        {"target": "normalised_length"},
        {"target": "normalised_length", "loss": "bce"},
        {"target": "length", "target_scale": 40.0},
        {"target": "log_length", "max_steps": 40},
        {"censored": "bootstrap"},
        {"censored": "prompt"},
        {"gradient_checkpointing": True},
        {"bf16": True},
    ],
    ids=str,
)
def test_each_choice_learns_the_toy_task(
    choice: dict[str, Any], base: Path, data: Path, tmp_path: Path
) -> None:
    """Read back as lengths, whatever the target: the best constant is wrong by far more."""
    longer = {"max_steps": 24, "tune": "full", "learning_rate": 3e-3} | choice
    run(data, tmp_path / "out", base, **longer)
    facts = read_config(tmp_path / "out")
    named = facts.training | {"target": facts.target, "target_scale": facts.target_scale}
    assert {name: named[name] for name in choice} == choice
    model = ValueModel.load(tmp_path / "out")
    with torch.inference_mode():
        z = torch.cat([model(torch.tensor([[255, 255, n]]))[0, -1:] for n in LENGTHS])
    lengths = length_from_logit(z, facts.gamma)
    torch.testing.assert_close(lengths, torch.tensor(LENGTHS).float(), rtol=0.5, atol=3)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_gradient_checkpointing_changes_nothing_but_the_memory(
    tune: Tune, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers run twice as often; with frozen weights below, a wrong set-up gives no gradient."""
    calls: list[int] = []
    forward = LlamaDecoderLayer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[-1] += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    for name in ("plain", "again"):
        calls.append(0)
        run(data, tmp_path / name, base, tune=tune, gradient_checkpointing=name == "again")
    assert calls[1] == 2 * calls[0]
    plain, again = (ValueModel.load(tmp_path / name, str(base)) for name in ("plain", "again"))
    with torch.inference_mode():
        values = [model(torch.arange(258)[None]) for model in (plain, again)]
    torch.testing.assert_close(values[0], values[1])


def test_no_logits_of_the_vocabulary_are_computed(base: Path, data: Path, tmp_path: Path) -> None:
    """A pack's would be the largest tensor of all: nothing but weights has 258 columns."""

    seen: set[tuple[int, ...]] = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            seen.update(tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Shapes():
        run(data, tmp_path / "out", base, tune="full", max_steps=1)
        evaluate(tmp_path / "out", data, holdout=1.0, only_json=True)
    assert (258, 128) in seen  # the embeddings
    assert not [shape for shape in seen if shape and shape[-1] == 258]


def test_the_log_for_tensorboard(base: Path, data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out", base, tensorboard=tmp_path / "log")
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    losses = events.Scalars("train/loss")
    assert [entry.step for entry in losses] == [1, 2, 3, 4, 5]
    curve = read_config(tmp_path / "out").training["loss_curve"]
    assert [entry.value for entry in losses] == pytest.approx(curve)


def test_the_model_card_tells_what_it_was_made_from(base: Path, data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out", base, tune="lora")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {NAME}\n" in card
    for fact in ("completions | 48", "learning_rate | 0.001", "max_steps | 5", "loss_curve | "):
        assert f"| {fact}" in card


def test_gamma_from_another_percentile(base: Path, tmp_path: Path) -> None:
    rows = [row(i, [1], [2] * (i + 1)) for i in range(41)]
    path = write(tmp_path / "a.parquet", rows)
    run(path, tmp_path / "out", base, max_steps=1, gamma_percentile=50.0)
    assert 1 - read_config(tmp_path / "out").gamma ** 21 == pytest.approx(0.99)


def test_the_scale_of_a_normalised_length_is_the_longest_label(
    base: Path, data: Path, tmp_path: Path
) -> None:
    run(data, tmp_path / "out", base, target="normalised_length", max_steps=1)
    assert read_config(tmp_path / "out").target_scale == max(LENGTHS)


def test_prompts_held_out_are_not_trained_on(base: Path, data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out", base, holdout=0.5, max_steps=1)
    facts = read_config(tmp_path / "out").training
    assert 10 < facts["completions"] < 38
    assert facts["holdout"] == 0.5


@pytest.mark.parametrize(
    ("first", "second"), [("lora", "full"), ("lora", "head"), ("full", "lora")]
)
def test_a_folder_can_be_written_again(
    first: Tune, second: Tune, base: Path, data: Path, tmp_path: Path
) -> None:
    """The bug guarded against: an adapter left from before is applied to the new backbone."""
    run(data, tmp_path / "out", base, tune=first, seed=1, max_steps=1)
    run(data, tmp_path / "out", base, tune=second, max_steps=1)
    run(data, tmp_path / "fresh", base, tune=second, max_steps=1)
    again, fresh = (ValueModel.load(tmp_path / name, str(base)) for name in ("out", "fresh"))
    with torch.inference_mode():
        assert torch.equal(again(torch.arange(258)[None]), fresh(torch.arange(258)[None]))
    if second != "lora":
        assert not list((tmp_path / "out").glob("adapter_*"))


# --- stopped runs -------------------------------------------------------------------------


class KilledError(Exception):
    pass


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run ends amid the step after `step`."""

    class Stopped(ValueTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == step:
                raise KilledError
            return super().compute_loss(*args, **kwargs)

    monkeypatch.setattr(trainer.training.train, "ValueTrainer", Stopped)


def run_until(step: int, *args: Any, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(KilledError):
            run(*args, **options)


@pytest.mark.parametrize("tune", TUNES)
def test_a_stopped_run_ends_as_if_it_had_not_been(
    tune: Tune, base: Path, data: Path, tmp_path: Path, history: list[dict[str, Any]]
) -> None:
    run(data, tmp_path / "whole", base, tune=tune)
    history.clear()
    run_until(3, data, tmp_path / "out", base, tune=tune)
    assert last_step(tmp_path / "out" / "steps") == tmp_path / "out" / "steps" / "checkpoint-2"
    run(data, tmp_path / "out", base, tune=tune)
    assert len([entry for entry in history if "loss" in entry]) == 3  # it did go on from step 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_run_is_not_repeated(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(data, out, base)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    run(data, out, base)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert f"{out}: finished before" in capsys.readouterr().out
    for options in ({"resume": False}, {"seed": 1}):
        run(data, out, base, **options)
        assert min(path.stat().st_mtime_ns for path in out.iterdir()) > max(before.values())


def test_stopped_twice_and_before_the_first_save(base: Path, data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "whole", base)
    for step in (1, 4):
        run_until(step, data, tmp_path / "out", base)
    run(data, tmp_path / "out", base)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_step_that_was_not_written_whole_is_passed_over(tmp_path: Path) -> None:
    assert last_step(tmp_path) is None
    for step in (8, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (8, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last_step(tmp_path) == tmp_path / "checkpoint-10"


@pytest.fixture(scope="module")
def stopped(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "out"
    run_until(3, data, folder, base)
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 2e-3),
        ("max_steps", 9),
        ("tokens_per_step", 128),
        ("max_length", 60),
        ("warmup_steps", 1),
        ("num_layers", 1),
        ("gamma", 0.5),
        ("seed", 7),
        ("gae_lambda", 0.5),
        ("loss", "bce"),
        ("weighting", "trajectory"),
        ("batches", "grouped"),
        ("target", "length"),
        ("base_model", "org/other"),
        ("lora", LoraShape(rank=2, alpha=8)),
    ],
)
def test_a_setting_that_changed_is_named(
    name: str, value: Any, stopped: Path, base: Path, data: Path
) -> None:
    before = contents(stopped)
    with pytest.raises(ValueError, match=rf"^{name}: the steps in .* resume it starts anew"):
        run(data, stopped, base, **{name: value})
    assert contents(stopped) == before


def test_another_way_of_tuning_is_named(stopped: Path, base: Path, data: Path) -> None:
    with pytest.raises(ValueError, match=r"^weights: .*'head', this run has 'full'"):
        run(data, stopped, base, tune="full")


def test_data_that_changed_are_named(stopped: Path, base: Path, tmp_path: Path) -> None:
    rows = toy_rows()
    rows[5]["completion_ids"][1] += 1
    with pytest.raises(ValueError, match=r"^data: the steps in"):
        run(write(tmp_path / "toy.parquet", rows), stopped, base)


def test_another_backbone_is_named(stopped: Path, base: Path, data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    with pytest.raises(ValueError, match=r"^model: the steps in"):
        run(data, stopped, other)


def test_without_resume_it_starts_anew(
    stopped: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(stopped, tmp_path / "out")
    run(data, out, base, seed=7, resume=False)
    run(data, tmp_path / "fresh", base, seed=7)
    assert contents(out) == contents(tmp_path / "fresh")


# --- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tune", "half"),
        ("censored", "keep"),
        ("target", "words"),
        ("loss", "absolute"),
        ("weighting", "prompt"),
        ("batches", "sorted"),
        ("gae_lambda", 1.1),
        ("gamma_percentile", 0.0),
        ("holdout", 1.0),
        ("holdout", -0.1),
        ("gamma", 0.0),
        ("gamma", 1.0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("epochs", 0.0),
        ("max_steps", 0),
        ("max_steps", -2),
        ("max_length", 1),
        ("tokens_per_step", 63),
        ("warmup_steps", -1),
        ("save_steps", 0),
        ("num_layers", 0),
        ("num_layers", 3),
        ("fp16", True),
    ],
)
def test_a_bad_argument_is_named_before_any_work(
    name: str, value: Any, base: Path, tmp_path: Path
) -> None:
    """Before any work: the rollouts are not even looked for."""
    with pytest.raises(ValueError, match=f"^{name}: {value!r}, must be "):
        run(tmp_path / "nothing", tmp_path / "out", base, **{name: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "shape"), [("rank", LoraShape(rank=0)), ("alpha", LoraShape(alpha=-1))]
)
def test_a_bad_adapter_is_named(name: str, shape: LoraShape, base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"^lora\.{name}: {getattr(shape, name)}, must be above 0"
    ):
        run(tmp_path / "nothing", tmp_path / "out", base, lora=shape)


def test_no_such_model(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model: .*nothing' does not load"):
        run(data, tmp_path / "out", tmp_path / "nothing")
    assert not list(tmp_path.iterdir())


def test_the_backbone_is_not_written_over(base: Path, data: Path) -> None:
    before = contents(base)
    with pytest.raises(ValueError, match=r"^output: .* must be another folder"):
        run(data, base / ".." / base.name, base)
    assert contents(base) == before


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda r: r | {"finish_reason": "length"}, {}, "^gamma: .* no finished completion"),
        (lambda r: r | {"finish_reason": "length"}, {"gamma": 0.9}, "^rollouts: .* nothing to tr"),
        (lambda r: r | {"prompt_ids": [1] * 65}, {}, "^rollouts: .* max_length 64"),
        (
            lambda r: r | {"prompt_ids": [258]},
            {},
            "^token id: 258, must be below .* vocab_size 258",
        ),
    ],
)
def test_rollouts_that_teach_nothing(
    change: Callable[[Any], Any],
    options: dict[str, Any],
    message: str,
    base: Path,
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a.parquet", [change(r) for r in toy_rows(3)])
    with pytest.raises(ValueError, match=message):
        run(path, tmp_path / "out", base, **options)
    assert not (tmp_path / "out").exists()
