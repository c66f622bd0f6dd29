"""Files of prompts."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.rollouts.prompts import Prompt

LINES = [
    {"prompt": "one", "id": 7, "domain": "news"},
    {"prompt": "zwei ü"},
    {"prompt": "three", "id": "x", "more": []},
]
PROMPTS = [Prompt("7", "news", "one"), Prompt("1", "", "zwei ü"), Prompt("x", "", "three")]


def write_prompts(path: Path, rows: Sequence[Any] = LINES) -> Path:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def many(tmp_path: Path, count: int = 10) -> Path:
    return write_prompts(tmp_path / "p.jsonl", [{"prompt": f"p{i}"} for i in range(count)])
