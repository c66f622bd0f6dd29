"""Equally many packs for each process, none of them twice.

accelerate gives process p the p-th of every `processes` passes and, where the last round has too
few, takes packs of the first again. Here packs of nothing fill that round, so that no text counts
twice and a step has the packs that it has on one process.
"""

from collections.abc import Iterator

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader

from trainer.data import NOTHING


class Even(BatchSampler):
    """The passes of `whole`, each a list of packs, and what the last round lacks."""

    def __init__(self, whole: BatchSampler, processes: int) -> None:
        super().__init__(whole.sampler, whole.batch_size, whole.drop_last)
        self.whole, self.processes = whole, processes

    def __len__(self) -> int:
        """Passes, in whole rounds."""
        return -(-len(self.whole) // self.processes) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        for packs in self.whole:
            yield packs + [NOTHING] * (self.batch_size - len(packs))
        for _ in range(len(self) - len(self.whole)):
            yield [NOTHING] * self.batch_size


def make_even(loader: DataLoader) -> None:
    """Of a loader that accelerate made for one process of several; else nothing changes."""
    shard = loader.batch_sampler
    if isinstance(shard, BatchSamplerShard) and shard.num_processes > 1:
        shard.batch_sampler = Even(shard.batch_sampler, shard.num_processes)
