"""Rollouts to learn from, and trainings of a size that a test waits for.

The toy task: a token's id is the number of tokens that follow it. The best constant has the
variance of u as its loss; a quarter of that is not reached without reading the tokens.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.candidates import Candidates
from trainer.columns import SCHEMA
from trainer.data import Rollout
from trainer.training.ahead import Ahead
from trainer.training.backbone import Backbone, LoraShape
from trainer.training.objective import Objective
from trainer.training.recipe import Recipe
from trainer.training.train import train
from trainer.training.training import Training

END = 256
LENGTHS = (4, 12, 40)
NAME = "org/tiny"
CONSTANT_LOSS = np.var([1 - 0.01 ** (r / 40) for n in LENGTHS for r in range(1, n + 1)])


def rollout(prompt: int, completion: int, finished: bool = True, name: str = "p") -> Rollout:
    """Token ids that tell their place: prompts count from 0, completions from 1000."""
    ids = np.arange(prompt), np.arange(1000, 1000 + completion)
    return Rollout(name, "d", *ids, finished)


def candidates(seed: int, positions: list[int], number: int = 3, below: int = 256) -> Candidates:
    """Random ones."""
    chance, shape = np.random.default_rng(seed), (len(positions), number)
    ids = np.stack([chance.permutation(below)[:number] for _ in positions])
    p, z = chance.random(shape, np.float32), chance.standard_normal(shape, np.float32)
    return Candidates(np.array(positions), ids, p / number, z)


def row(number: int, prompt: list[int], completion: list[int], reason: str = "stop") -> Any:
    """Of a file of rollouts."""
    return {
        "prompt_id": str(number),
        "domain": "",
        "prompt": "",
        "prompt_ids": prompt,
        "completion_ids": completion,
        "finish_reason": reason,
    }


def toy_rows(count: int = 48, distinct: bool = False) -> list[dict[str, Any]]:
    """Of three prompts, or of `count` `distinct` ones, of which a share can be held out."""
    lengths = [LENGTHS[number % len(LENGTHS)] for number in range(count)]
    return [
        row(i, [i if distinct else 255, 255, n], [*range(n - 1, 0, -1), END])
        for i, n in enumerate(lengths)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return path


def grouped(options: dict[str, Any], **kinds: type) -> dict[str, Any]:
    """Options by their own names, in the dataclasses that a command takes them in."""
    rest, groups = dict(options), {}
    for name, kind in kinds.items():
        own = {field.name for field in fields(kind)} & rest.keys()
        groups[name] = kind(**{field: rest.pop(field) for field in own})
    return rest | groups


def training(base: Path, **options: Any) -> Training:
    """Five steps of three packs."""
    settings: dict[str, Any] = {
        "model": str(base),
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
    kinds = {"backbone": Backbone, "objective": Objective, "ahead": Ahead, "recipe": Recipe}
    return Training(**grouped(settings | options, **kinds))


def run(data: Path, output: Path, base: Path, **options: Any) -> None:
    """Train as `training` says."""
    own = {
        name: options.pop(name)
        for name in ("resume", "tensorboard", "report_to")
        if name in options
    }
    train(data, output, training=training(base, **options), **own)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
