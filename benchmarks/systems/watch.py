"""A value server of a tiny random model under load for a time, and its memory along it."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from tqdm import tqdm

from lenvm_vllm.commands.processes import Server
from lenvm_vllm.commands.servers import lenvm_serve
from tests.support.tiny import tiny_checkpoint


@contextmanager
def tiny_value_server(*flags: object, max_position: int = 512) -> Iterator[Server]:
    """flags: more of `lenvm serve`."""
    with TemporaryDirectory() as name:
        checkpoint = tiny_checkpoint(Path(name) / "model", max_position=max_position)
        log = Path(name) / "log"
        with lenvm_serve(checkpoint, log, "--dtype", "float32", *flags) as server:
            yield server


class Watch:
    """A progress bar over time, and the server's memory along it."""

    def __init__(self, server: Server, minutes: float) -> None:
        self.process = psutil.Process(server.process.pid)
        self.rss_mb: list[float] = []
        self._end = time.monotonic() + 60 * minutes
        self._bar = tqdm(total=round(60 * minutes), unit="s", file=sys.stderr)

    def goes_on(self) -> bool:
        self.rss_mb.append(self.process.memory_info().rss / 2**20)
        left = self._end - time.monotonic()
        self._bar.update(round(self._bar.total - left) - self._bar.n)
        return left > 0

    def memory(self) -> dict[str, float]:
        """After a tenth of the time, and at the end."""
        self._bar.close()
        return {
            "rss_mb_after_10_percent": round(self.rss_mb[len(self.rss_mb) // 10], 1),
            "rss_mb_at_end": round(self.rss_mb[-1], 1),
        }
