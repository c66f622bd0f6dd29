"""What rollouts cost a process: read as training reads them, or as a loop over rows would.

    python -m tests.support.loaded (arrow|rows) FILES

prints {"megabytes": highest memory above that before, "digest": of all examples, "tokens": …}.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from trainer.data import PackedDataset, finished_lengths, make_example
from trainer.digests import digest
from trainer.evaluation.baselines import fit_baselines
from trainer.rollout_files import files_of, read_rollouts

LONGEST = 3000


def read_arrow(path: Path) -> tuple[Any, str, int]:
    """As `lenvm train` does, with all that it makes of rollouts before the first step."""
    rollouts = read_rollouts(path)
    examples = [make_example(r, LONGEST) for r in rollouts]
    finished_lengths(rollouts)
    fit_baselines(rollouts, 0.997, LONGEST)
    dataset = PackedDataset(examples, LONGEST, seed=0)
    dataset[len(dataset) - 1]
    return dataset, digest(examples), sum(e.length for e in examples)


def read_rows(path: Path) -> tuple[Any, str, int]:
    """A row after the other, each with arrays of its own."""
    kept, total = [], hashlib.sha256()
    for file in files_of(path):
        for row in pq.read_table(file).to_pylist():
            ids = np.array(row["prompt_ids"] + row["completion_ids"], dtype=np.int64)
            labels = np.full(len(ids), -100, dtype=np.float32)
            first, length = len(row["prompt_ids"]) - 1, len(row["completion_ids"])
            labels[first:-1] = np.arange(length, 0, -1)
            kept.append((row, ids[:LONGEST], labels[:LONGEST]))
            for array in kept[-1][1:]:
                total.update(len(array).to_bytes(8, "big") + array.tobytes())
            total.update(b"\0")
    return kept, total.hexdigest(), sum(len(ids) for _, ids, _ in kept)


def memory(name: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


if __name__ == "__main__":
    read = {"arrow": read_arrow, "rows": read_rows}[sys.argv[1]]
    small, large = map(Path, sys.argv[2:])
    read(small)  # whatever the libraries load once
    before = memory("VmRSS")
    kept, found, tokens = read(large)
    growth = memory("VmHWM") - before
    print(json.dumps({"megabytes": round(growth, 1), "digest": found, "tokens": tokens}))
