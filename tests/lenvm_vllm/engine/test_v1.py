"""Model Runner V1: rows follow the changes of the batch.

With rails only, a request is known by the end that it must not take yet.
"""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    MoveDirectionality,
)

from lenvm_vllm.engine.processor import LenvmLogitsProcessor
from tests.support.fakes import EOS, Server, V, config, exactly, free, params, replicas_of
from tests.support.v1_batch import added, apply, processor_with, rails_only, suppressed, update
from value_server.contract import wire

SWAP, ONE_WAY = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL
quick = settings(deadline=None, max_examples=40)


def test_no_change_of_the_batch() -> None:
    served = rails_only()
    served.update_state(None)
    served.update_state(update(added=[added(1, params(9, eos=5))]))
    served.update_state(None)
    assert suppressed(served) == {1: [5]}


def test_removed_then_added_then_moved() -> None:
    """In any other order request 6 would be gone, or still in row 1."""
    served = rails_only()
    served.update_state(update(added=[added(0, params(9, eos=4)), added(1, params(9, eos=5))]))
    served.update_state(
        update(removed=[1], added=[added(1, params(9, eos=6))], moved=[(1, 3, ONE_WAY)])
    )
    assert suppressed(served) == {0: [4], 3: [6]}


def test_added_on_an_occupied_index_replaces() -> None:
    served = rails_only()
    served.update_state(update(added=[added(0, params(9, eos=4)), added(1, params(9, eos=5))]))
    served.update_state(update(added=[added(0, params()), added(1, params(9, eos=6))]))
    assert suppressed(served) == {1: [6]}


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        ([(0, 1, SWAP)], {1: [4], 0: [5]}),
        ([(0, 2, SWAP)], {2: [4], 1: [5]}),
        ([(2, 0, SWAP)], {2: [4], 1: [5]}),
        ([(0, 2, ONE_WAY)], {2: [4], 1: [5]}),
        ([(0, 1, ONE_WAY)], {1: [4]}),
        ([(2, 0, ONE_WAY)], {1: [5]}),
        ([(0, 1, SWAP), (1, 2, SWAP), (0, 3, ONE_WAY)], {2: [4], 3: [5]}),
    ],
)
def test_moves(moves: Any, expected: Any) -> None:
    """Row 2 holds a request without a target."""
    served = rails_only()
    requests = [params(9, eos=4), params(9, eos=5), params()]
    served.update_state(update(added=[added(row, p) for row, p in enumerate(requests)]))
    served.update_state(update(moved=moves))
    assert suppressed(served) == expected


@pytest.mark.parametrize(
    "change",
    [
        update(removed=[0]),
        update(added=[added(0, params())]),
        update(moved=[(1, 0, ONE_WAY)]),
        update(moved=[(2, 0, ONE_WAY)]),
        update(moved=[(0, 1, SWAP)], removed=[0]),
    ],
)
def test_whatever_ends_a_request_ends_its_session(change: BatchUpdate) -> None:
    """Row 1 goes on, row 2 has no target."""
    server = Server()
    served = processor_with(server)
    served.update_state(
        update(added=[added(0, params(9)), added(1, params(9)), added(2, params())])
    )
    served.apply(torch.zeros(3, V))
    assert server.last is not None
    ended, stays = server.last.sessions
    served.update_state(change)
    served.apply(torch.zeros(3, V))
    assert server.last.closed == [ended]
    assert server.sessions == {stays}


def test_a_preempted_request_goes_on_where_it_was() -> None:
    """Added again with its output so far; the server gets a new session with all of it."""
    server = Server()
    served = processor_with(server)
    output: list[int] = []
    wanted = params(exactly(4))
    served.update_state(update(added=[added(0, wanted, output)]))
    for token in (9, 10):
        served.apply(torch.zeros(1, V))
        output.append(token)
    (before,) = server.sessions
    served.update_state(update(removed=[0]))
    served.update_state(update(added=[added(1, wanted, output)]))
    assert suppressed(served, 2)[1][0] == EOS
    assert server.last is not None
    assert server.last.closed == [before]
    assert wire.unpack_ids(server.last.tokens).tolist() == [7, 8, 9, 10]
    output.append(11)
    after = apply(served, torch.zeros(2, V))
    assert after[1].isfinite().nonzero()[:, 0].tolist() == [EOS]


def test_requests_without_a_turn_keep_their_sessions() -> None:
    """With a pipeline each step has some of them; the others are taken out and put back."""
    server = Server()
    staged = config()
    staged.parallel_config.pipeline_parallel_size = 2
    served = LenvmLogitsProcessor(staged, torch.device("cpu"), False, client=replicas_of(server))
    outputs: list[list[int]] = [[], [], []]
    wishes = [added(0, params(free(30)), output) for output in outputs]
    served.update_state(update(added=[wishes[0]]))
    for step in range(20):
        served.apply(torch.zeros(1, V))
        outputs[step % 2].append(9)
        served.update_state(update(removed=[0], added=[wishes[(step + 1) % 2]]))
    assert len(server.sessions) == 2
    assert server.last is not None
    assert server.last.closed == []
    assert wire.unpack_ids(server.last.tokens).tolist() == [9]  # not the text again
    # One that has ended is closed at once, one that does not come back after some steps.
    outputs[0].append(EOS)
    served.update_state(update(removed=[0], added=[wishes[2]]))
    served.apply(torch.zeros(1, V))
    assert len(server.last.closed) == 1
    for _ in range(20):
        served.update_state(None)
    served.apply(torch.zeros(1, V))
    assert len(server.last.closed) == 1
    assert len(server.sessions) == 1


ROWS = 6


def drawn_update(rng: random.Random, batch: dict[int, int | None]) -> BatchUpdate:
    """Anything that vLLM's contract allows, done to `batch` (row: own end, None: no target) too."""
    removed = rng.sample(sorted(batch), rng.randint(0, min(2, len(batch))))
    for row in removed:
        del batch[row]
    entries = []
    for row in rng.sample(range(ROWS), rng.randint(0, 2)):
        end = rng.choice([None, *range(1, V)])
        batch[row] = end
        entries.append(added(row, params() if end is None else params(500, eos=end)))
    moved = []
    for _ in range(rng.randint(0, 3)):
        source, to = rng.sample(range(ROWS), 2)
        direction = rng.choice([SWAP, ONE_WAY])
        if source not in batch or (direction is SWAP and to not in batch):
            continue
        moved.append((source, to, direction))
        mover, other = batch.pop(source), batch.pop(to, None)
        batch[to] = mover
        if direction is SWAP:
            batch[source] = other
    return update(removed, entries, moved)


@quick
@given(st.integers(0, 8), st.randoms(use_true_random=True), st.sampled_from([0, 2]))
def test_any_history_of_a_batch(steps: int, rng: random.Random, rank: int) -> None:
    """Every row is railed as its own request wants; the server holds one session for each."""
    server, batch = Server(lookahead_rank=rank), dict[int, int | None]()
    up, down = processor_with(server), rails_only()
    for _ in range(steps):
        change = drawn_update(rng, batch)
        for processor in (up, down):
            processor.update_state(change)
        ends = {row: [end] for row, end in batch.items() if end is not None}
        assert suppressed(down, ROWS) == ends
        steered = suppressed(up, ROWS)
        assert steered.keys() == ends.keys()
        assert all(ends[row][0] in steered[row] for row in ends)
        if ends:
            assert len(server.sessions) == len(ends)
