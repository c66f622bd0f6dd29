"""Packs are shared among processes: equally many passes for each, and no pack twice."""

import pytest
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from tests.support.training import rollout
from trainer.data import NO_LABEL, NOTHING, PackedDataset, make_example
from trainer.training.even import Even, make_even


@pytest.mark.parametrize("packs", range(1, 14))
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_pack_once(packs: int, size: int, processes: int) -> None:
    """A round of passes has the packs that one process would take for it."""
    whole = BatchSampler(SequentialSampler(range(packs)), size, drop_last=False)
    even = Even(whole, processes)
    shares = [[*BatchSamplerShard(even, processes, rank)] for rank in range(processes)]
    rounds = -(-packs // (size * processes))
    assert [len(own) for own in shares] == [rounds] * processes
    assert len(BatchSamplerShard(even, processes, 0)) == rounds
    taken = [pack for passes in zip(*shares, strict=True) for own in passes for pack in own]
    assert taken == [*range(packs), *[NOTHING] * (rounds * size * processes - packs)]


def test_of_a_loader_of_two_processes() -> None:
    """Shuffled alike by both, in another order each epoch."""
    loaders = []
    for rank in range(2):
        data = range(7)
        whole = DataLoader(data, sampler=RandomSampler(data), batch_size=2)
        options = {"num_processes": 2, "process_index": rank, "use_seedable_sampler": True}
        loaders.append(prepare_data_loader(whole, data_seed=3, put_on_device=False, **options))
        make_even(loaders[-1])
    epochs = []
    for epoch in range(2):
        for loader in loaders:
            loader.set_epoch(epoch)
        both = zip(*(loader.batch_sampler for loader in loaders), strict=True)
        epochs.append([pack for passes in both for own in passes for pack in own])
    assert sorted(epochs[0]) == sorted(epochs[1]) == [NOTHING, *range(7)]
    assert epochs[0][-1] == epochs[1][-1] == NOTHING
    assert epochs[0] != epochs[1]  # by chance alike: 1 in 5,040


def test_a_pack_of_nothing() -> None:
    examples = [make_example(rollout(2, 5), 64)]
    dataset = PackedDataset(examples, 64, seed=0)
    item = dataset[NOTHING]
    assert item.keys() == dataset[0].keys()
    assert all(len(part) == 1 for part in item.values())
    assert (item["labels"].item(), item["weights"].item()) == (NO_LABEL, 0)
    assert len(list(dataset)) == len(dataset) == 1
