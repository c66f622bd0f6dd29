"""Prompts with pictures through a real vLLM, and a value model that sees them.

The model is a tiny random Idefics 3: of the families here the one whose classes in vLLM need no
torchvision. What is seen: the tokens that vLLM makes of a picture are as many as the rows that the
value model puts in their place.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.e2e.test_training import lenvm
from tests.support.tiny_vision import PLACEHOLDER, as_png, picture, tiny_idefics3
from trainer.rollout_files import read_rollouts
from value_server.contract.checkpoint import read_config

pytestmark = pytest.mark.e2e

LINES: list[dict[str, Any]] = [
    {"prompt": "Say a.", "images": "0.png"},
    {"prompt": "Say b.", "images": ["1.png", "0.png"]},
    {"prompt": "Say c."},
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Say"},
                    {"type": "image_url", "image_url": {"url": "2.png"}},
                    {"type": "text", "text": "d."},
                ],
            }
        ]
    },
    {"prompt": "e" * 600, "images": "0.png"},  # too long
]


def test_from_pictures_to_a_value_model(tmp_path: Path) -> None:
    base, out = tiny_idefics3(tmp_path / "base"), tmp_path / "out"
    for number, size in enumerate(((90, 60), (40, 100), (64, 64))):
        (tmp_path / f"{number}.png").write_bytes(as_png(picture(number, *size)))
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    sampling = ("--n", 3, "--max-tokens", 20, "--engine-arg", "enforce_eager=true")
    lenvm("rollout", prompts, out, "--model", base, *sampling)
    found = read_rollouts(out)
    assert [len(r.pictures) for r in found] == [1] * 3 + [2] * 3 + [0] * 3 + [1] * 3
    places = [(r.prompt_ids == PLACEHOLDER).sum() for r in found]
    assert [n > 0 and n % 4 == 0 for n in places] == [bool(r.pictures) for r in found]
    data = pq.read_table(out)["picture_bytes"].to_pylist()
    assert sum(one is not None for own in data for one in own or ()) == 3
    options = ("--model", base, "--tune", "lora", "--max-steps", 4, "--holdout", 0)
    options += ("--censored", "bound", "--gamma", 0.9, "--max-length", 256, "--no-bf16")
    lenvm("train", out, tmp_path / "value", *options, "--tokens-per-step", 512)
    assert read_config(tmp_path / "value").pictures
    asked = ("--holdout", 1, "--dtype", "float32", "--json")
    lenvm("tokens", tmp_path / "value", out, *asked, "--min-count", 1)
