"""Numbers of the engine, shown on vLLM's own `/metrics`.

The engine steps in another process than the one that answers HTTP, and vLLM shares Prometheus
files between processes only with several API servers. So each engine process keeps its sums in
a small file of a folder that an environment variable names; the middleware adds them up.
"""

import atexit
import contextlib
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger("vllm.lenvm")

FOLDER = "LENVM_METRICS_DIR"
HELP = {
    "requests": "Requests with a length target; each sample counts.",
    "steps": "Engine steps in which a text could be steered.",
    "fallback_steps": "Those of lenvm_steps in which no text had values in time.",
    "rows": "Texts in these steps whose next token values could have moved.",
    "valued_rows": "Those of lenvm_rows that had their values in time.",
    "unguided_rows": "Texts in these steps for which no values could be asked.",
    "unseen_requests": "Requests whose pictures, sound or video the value model does not see.",
    "pictures": "Pictures that a value server took.",
    "lost_pictures": "Pictures that a value server did not take.",
    "plan_seconds": "Time of the plugin in these steps, the value server's included.",
    "value_seconds": "Time in which these steps waited for the value server.",
    "finished": "Requests with a length that ended by themselves or by a rail.",
    "deviation_tokens": "Sum of |tokens - target| of those with a target in tokens.",
    "deviation_ratio": "Sum of |length - target| / target of finished requests.",
    "gave_way": "Requests whose upper rail gave way to a grammar or an allow-list.",
    "endings": "Other endings that were sampled.",
    "ending_tokens": "Tokens of other endings.",
    "ending_rounds": "Rounds of other endings, sampled side by side.",
    "ending_seconds": "Time in which answers waited for other endings.",
    "stream_pauses": "Streams that stopped before their end for other endings.",
    "stream_pause_seconds": "Time for which they stopped; a part of lenvm_ending_seconds.",
}
_NAMES = list(HELP)


class Counters:
    """The sums of this process; without a folder that takes its file nobody sees them."""

    def __init__(self) -> None:
        self._sums: NDArray[np.float64] = np.zeros(len(HELP))
        if not (folder := os.environ.get(FOLDER)):
            return
        try:
            path = Path(folder) / str(os.getpid())
            self._sums = mapped(path, np.dtype(np.float64), len(HELP))
        except OSError as error:
            logger.warning("%s: no metrics of length targets (%s)", FOLDER, error)

    def add(self, name: str, amount: float = 1.0) -> None:
        self._sums[_NAMES.index(name)] += amount


def mapped(path: Path, kind: np.dtype[Any], length: int) -> NDArray[Any]:
    """(length,) zeros in a file. Raises OSError.

    All of it is there: where a page were to be made later, a full disk would end the process.
    """
    path.write_bytes(bytes(kind.itemsize * length))
    return np.memmap(path, kind, "r+", shape=length)


def share_folder() -> None:
    """Name a folder for this process and those that it starts, gone with this one.

    Where none can be made (a file system that is read only) vLLM starts nevertheless.
    """
    if FOLDER in os.environ:
        return
    try:
        folder, owner = tempfile.mkdtemp(prefix="lenvm-metrics-"), os.getpid()
    except OSError as error:
        logger.warning("%s: no metrics, and nothing told of lengths (%s)", FOLDER, error)
        return
    os.environ[FOLDER] = folder
    atexit.register(_remove, folder, owner)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked child runs this at its own end too
        shutil.rmtree(folder, ignore_errors=True)


def exposition() -> bytes:
    """All processes' sums in Prometheus' text format; nothing where no folder is named."""
    if FOLDER not in os.environ:
        return b""
    sums = np.zeros(len(HELP))
    with contextlib.suppress(OSError):  # a folder that somebody cleared away
        for path in Path(os.environ[FOLDER]).iterdir():
            if path.stat().st_size == sums.nbytes:  # not one that is being made
                sums += np.fromfile(path, np.float64)
    lines = [
        f"# HELP lenvm_{name}_total {HELP[name]}\n# TYPE lenvm_{name}_total counter\n"
        f"lenvm_{name}_total {value!r}\n"
        for name, value in zip(_NAMES, sums.tolist(), strict=True)
    ]
    return "".join(lines).encode()


def waiting_requests() -> float:
    """Requests in vLLM's queue, as its own gauge says; 0 where it keeps none in this process."""
    from prometheus_client import REGISTRY

    found = REGISTRY.restricted_registry(["vllm:num_requests_waiting"]).collect()
    return sum(sample.value for metric in found for sample in metric.samples)
