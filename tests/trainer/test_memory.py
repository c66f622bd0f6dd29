"""What a million tokens of rollouts cost each process that trains."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.training import row, write

ROOT = Path(__file__).parents[2]
PROMPTS, SAMPLES = 1000, 4


def rollouts(folder: Path, prompts: int, per_file: int = 250) -> Path:
    """Of 60 tokens and completions of 190 in the mean, ids as of a large vocabulary."""
    chance = np.random.default_rng(prompts)
    folder.mkdir()
    for start in range(0, prompts, per_file):
        rows = []
        for number in range(start, min(start + per_file, prompts)):
            prompt = chance.integers(0, 150_000, 60).tolist()
            for size in chance.integers(30, 351, SAMPLES):
                completion = chance.integers(0, 150_000, size).tolist()
                rows.append(row(number, prompt, completion) | {"prompt": "a word " * 40})
        write(folder / f"part-{start:05d}.parquet", rows)
    return folder


def loaded(how: str, *folders: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.loaded", how, *map(str, folders)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(found.stdout)
    return result


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_million_tokens_take_50_megabytes_at_most(tmp_path: Path) -> None:
    """At its highest, from the file to the packs; the same texts as row by row."""
    folders = rollouts(tmp_path / "small", 20), rollouts(tmp_path / "large", PROMPTS)
    ours, naive = loaded("arrow", *folders), loaded("rows", *folders)
    assert ours["tokens"] == naive["tokens"] == pytest.approx(1_000_000, rel=0.03)
    assert ours["digest"] == naive["digest"]
    assert ours["megabytes"] < 50
    assert ours["megabytes"] < naive["megabytes"] / 1.5  # which takes 70 to 85, as memory is used
