"""The logits processor in the hands of vLLM's own classes, and the hooks that bring it there.

Legend: V vocabulary. Token 0 is the end; token x is worth x more tokens.
"""

import argparse
import logging
import math
import random
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
    _load_logitsprocs_by_fqcns,
    build_logitsprocs,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

import lenvm_vllm
from lenvm_vllm import plugin
from lenvm_vllm.api.intake import take_in
from lenvm_vllm.engine import rows as engine_rows
from lenvm_vllm.engine.processor import LenvmLogitsProcessor
from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.engine.v1 import V1Processor
from lenvm_vllm.host import served
from lenvm_vllm.plugin import MIDDLEWARE, PROCESSOR, complete_names, register
from lenvm_vllm.text.tokenizer import tokenizer_of
from lenvm_vllm.values.client import CircuitOpen, TimedOut
from tests.support.fakes import EOS, INFO, Server, V, config, exactly, free, params, same_bits
from tests.support.tiny import tiny_tokenizer
from tests.support.tiny_llm import tiny_llm
from value_server.contract import wire
from value_server.contract.checkpoint import tokenizer_fingerprint

INF = math.inf
SWAP, ONE_WAY = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL
quick = settings(deadline=None, max_examples=40)


def processor_with(server: Server) -> LenvmLogitsProcessor:
    return LenvmLogitsProcessor(config(), torch.device("cpu"), False, client=server)


def update(removed: Any = (), added: Any = (), moved: Any = ()) -> BatchUpdate:
    return BatchUpdate(batch_size=0, removed=removed, added=added, moved=moved)


def added(row: int, wanted: SamplingParams, output: list[int] | None = None) -> Any:
    return row, wanted, [7, 8], [] if output is None else output


def apply(served: LenvmLogitsProcessor, logits: Tensor) -> Tensor:
    changed = logits.clone()
    assert served.apply(changed) is changed
    return changed


def suppressed(served: LenvmLogitsProcessor, rows: int = 4) -> dict[int, list[int]]:
    """The tokens that each row that is not left alone must not take."""
    after = apply(served, torch.zeros(rows, V))
    blocked = {row: after[row].isneginf().nonzero()[:, 0].tolist() for row in range(rows)}
    return {row: tokens for row, tokens in blocked.items() if tokens}


def rails_only() -> LenvmLogitsProcessor:
    return processor_with(Server(TimedOut("slow")))


# ---- the batch. With rails only, a request is known by the end that it must not take yet.


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
    served = LenvmLogitsProcessor(staged, torch.device("cpu"), False, client=server)
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
@given(st.integers(0, 8), st.randoms(use_true_random=True))
def test_any_history_of_a_batch(steps: int, rng: random.Random) -> None:
    """Every row is railed as its own request wants; the server holds one session for each."""
    server, batch = Server(), dict[int, int | None]()
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


# ---- rows without a target, batches without one


@quick
@given(st.integers(0, 2**31), st.sets(st.integers(0, 4)), st.booleans())
def test_rows_without_a_target_stay_the_same_to_the_bit(
    seed: int, guided: set[int], down: bool
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(5, V)
    logits[torch.rand(5, V) < 0.1] = -INF
    logits[[row for row in range(5) if row not in guided], 3] = math.nan
    served = rails_only() if down else processor_with(Server())
    served.update_state(
        update(added=[added(row, params(9) if row in guided else params()) for row in range(5)])
    )
    after = apply(served, logits)
    for row in range(5):
        if row in guided:
            assert after[row, EOS] == -INF
        else:
            assert same_bits(after[row], logits[row])


def test_a_batch_without_targets_makes_no_call() -> None:
    server = Server()
    served = processor_with(server)
    logits = torch.randn(2, V)
    assert same_bits(apply(served, logits), logits)
    served.update_state(update(added=[added(0, params()), added(1, params({"other": 1}))]))
    assert same_bits(apply(served, logits), logits)
    served.update_state(update(added=[added(0, params(9))]))
    apply(served, logits)
    served.update_state(update(removed=[0]))
    calls = server.calls
    assert same_bits(apply(served, logits), logits)
    assert server.calls == calls == 1


def test_a_row_whose_end_is_due_is_not_asked_about() -> None:
    server = Server()
    served = processor_with(server)
    served.update_state(update(added=[added(0, params(exactly(1))), added(1, params(9))]))
    apply(served, torch.zeros(2, V))
    assert server.last is not None
    assert len(server.last.sessions) == 1


def test_a_greedy_request_takes_the_steered_argmax() -> None:
    """Steered at T = 1. Without a target it would take token 20."""
    served = processor_with(Server())
    target = free(6) | {"length_policy": "greedy"}
    served.update_state(update(added=[added(0, params(target, temperature=0.0))]))
    logits = torch.zeros(1, V)
    logits[0, [5, 20]] = torch.tensor([4.0, 5.0])
    assert int(apply(served, logits).argmax()) == 5


@pytest.mark.parametrize(("beta", "best"), [(-400.0, 3), (400.0, 20), (0.0, 11)])
def test_a_tilt(beta: float, best: int) -> None:
    served = processor_with(Server())
    target = {"length_mode": "tilt", "length_beta": beta}
    served.update_state(update(added=[added(0, params(target, temperature=0.5, top_k=3))]))
    logits = torch.full((1, V), 3.5)
    logits[0, [3, 11, 20]] = torch.tensor([4.0, 4.1, 4.0])
    after = apply(served, logits)
    assert int(after.argmax()) == best
    assert (after[0] > -INF).nonzero()[:, 0].tolist() == [3, 11, 20]


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({}, 13),  # 0.999 of the 15 of the settings
        ({"top_k": -1}, 13),
        ({"top_k": 3}, 3),
        ({"top_p": 0.5}, 2),  # 0.39 and 0.24
        ({"min_p": 0.5}, 2),
        ({"min_p": 0.5, "temperature": 2.0}, 3),
        ({"temperature": 0.0}, 13),
    ],
)
def test_the_cut_is_that_of_the_request(fields: Any, left: int) -> None:
    served = processor_with(Server())
    served.update_state(update(added=[added(0, params(free(9), **fields))]))
    logits = -torch.arange(V)[None] / 2
    logits[0, EOS] = -INF
    assert int((apply(served, logits) > -INF).sum()) == left


class Copies(TorchDispatchMode):
    """Counts copies to the host from the device "meta", which has no numbers; any other wish to
    know one of them fails. The host gets zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        if func is torch.ops.aten._to_copy.default and device == torch.device("cpu"):
            self.count += args[0].is_meta
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_one_copy_from_the_device() -> None:
    """Rows of all kinds; their writes and rails go there without an answer."""
    tilt = {"length_mode": "tilt", "length_beta": 1.0}
    wishes = [params(9), params(exactly(1)), params(tilt), params(tilt, top_p=0.5), params(free(9))]
    served = processor_with(server := Server())
    served.update_state(update(added=[added(row, wanted) for row, wanted in enumerate(wishes)]))
    with Copies() as copies:
        served.apply(torch.empty(5, V, device="meta"))
    assert copies.count == 1
    assert server.last is not None
    assert len(server.last.sessions) == 4
    assert served._rows._trouble is None  # type: ignore[attr-defined]


# ---- guard rails


ERRORS = [None, TimedOut("slow"), CircuitOpen("not yet"), RuntimeError("bug"), KeyError("x")]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("end", [-9.0, 0.0, 9.0])
def test_rails_land_exactly_whatever_the_server_does(error: Any, end: float) -> None:
    rng = random.Random(0)
    served = processor_with(Server(error))
    outputs: list[list[int]] = [[] for _ in range(4)]
    targets = [1, 2, 7, 20]
    served.update_state(
        update(
            added=[
                added(row, params(exactly(tokens), temperature=0.8), outputs[row])
                for row, tokens in enumerate(targets)
            ]
        )
    )
    for _ in range(20):
        logits = torch.randn(4, V)
        logits[:, EOS] = end
        p = torch.softmax(apply(served, logits).double() / 0.8, dim=-1).tolist()
        for row, output in enumerate(outputs):
            if output[-1:] != [EOS]:
                output.append(rng.choices(range(V), p[row])[0])
            if output[-1] == EOS:
                served.update_state(update(removed=[row]))
    assert [len(output) for output in outputs] == targets
    assert all(output.index(EOS) == len(output) - 1 for output in outputs)


def railed(logits: Tensor, target: Any, generated: int = 0, **fields: Any) -> Tensor:
    """(V,) after the rails alone; logits (V,)."""
    served = rails_only()
    served.update_state(update(added=[added(0, params(target, **fields), [9] * generated)]))
    return apply(served, logits[None])[0]


@pytest.mark.parametrize(
    ("target", "first", "last"),
    [
        ({"length_target": 10, "length_tolerance": 0.2}, 8, 12),
        ({"length_target": 10, "length_mode": "at_least"}, 10, None),
        ({"length_target": 10, "length_mode": "at_most"}, 1, 10),
        ({"length_target": 10, "length_tolerance": "off"}, 1, None),
        ({"length_mode": "tilt", "length_beta": 1.0}, 1, None),
    ],
)
def test_the_end_is_closed_open_or_due(target: Any, first: int, last: int | None) -> None:
    logits = torch.randn(V)
    for number in range(1, 15):
        after = railed(logits, target, number - 1, stop_token_ids=[4])
        expected = logits.clone()
        if number < first:
            expected[[EOS, 4]] = -INF
        elif last is not None and number >= last:
            expected[:] = -INF
            expected[[EOS, 4]] = logits[[EOS, 4]]
        assert same_bits(after, expected)


def test_tokens_not_known_yet_count() -> None:
    """Asynchronous scheduling: -1 is a token all the same."""
    served = rails_only()
    served.update_state(update(added=[added(0, params(exactly(3)), [9, -1])]))
    assert apply(served, torch.zeros(1, V))[0].isfinite().nonzero()[:, 0].tolist() == [EOS]


@pytest.mark.parametrize("target", [exactly(1), exactly(9)])
@pytest.mark.parametrize("open_tokens", [[EOS], [9], [EOS, 9], [5], []])
@pytest.mark.parametrize("down", [True, False])
def test_a_row_is_never_emptied_nor_opened(target: Any, open_tokens: list[int], down: bool) -> None:
    """What a grammar forbids stays forbidden, and what it allows alone is taken."""
    served = rails_only() if down else processor_with(Server())
    served.update_state(update(added=[added(0, params(target, stop_token_ids=[5]))]))
    logits = torch.full((1, V), -INF)
    logits[0, open_tokens] = 1.5
    left = (apply(served, logits)[0] > -INF).nonzero()[:, 0].tolist()
    ends = [token for token in open_tokens if token in (EOS, 5)]
    others = [token for token in open_tokens if token not in ends]
    due = target["length_target"] == 1
    assert left == ((ends or others) if due else (others or ends))


@pytest.mark.parametrize("target", [exactly(1), exactly(9)])
@pytest.mark.parametrize("eos", [V, V + 3, -1, -V - 3])
def test_ends_beyond_the_vocabulary(target: Any, eos: int) -> None:
    logits = torch.randn(V)
    assert same_bits(railed(logits, target, eos=eos), logits)


# ---- what else a request may ask for


def test_every_token_that_stops_is_an_end() -> None:
    """stop_token_ids, the model's own end and those of its generation config."""
    wanted = params(exactly(1), stop_token_ids=[4, 9])
    wanted.update_from_generation_config({"eos_token_id": [EOS, 6]}, EOS)
    served = rails_only()
    served.update_state(update(added=[added(0, wanted)]))
    after = apply(served, torch.zeros(1, V))
    assert after[0].isfinite().nonzero()[:, 0].tolist() == [EOS, 4, 6, 9]


def test_samples_of_one_request_have_a_session_each() -> None:
    """n = 2: vLLM runs each as a request of its own, with the same prompt."""
    server = Server()
    served = processor_with(server)
    wanted, outputs = params(free(9), n=2), [[], []]
    served.update_state(update(added=[added(row, wanted, outputs[row]) for row in range(2)]))
    served.apply(torch.zeros(2, V))
    assert len(server.sessions) == 2
    for row, token in enumerate((11, 12)):
        outputs[row].append(token)
    served.apply(torch.zeros(2, V))
    assert server.last is not None
    assert wire.unpack_ids(server.last.tokens).tolist() == [11, 12]


def sampled(wanted: SamplingParams, logits: Tensor, allowed: Tensor | None = None) -> Tensor:
    """(rows,) tokens by vLLM's own sampler, its built-in processors before ours."""
    rows, config_ = len(logits), config()
    config_.scheduler_config = SimpleNamespace(max_num_seqs=rows)
    processors = build_logitsprocs(config_, torch.device("cpu"), False, False, (PROCESSOR,))
    ours = next(p for p in processors.non_argmax_invariant if isinstance(p, V1Processor))
    ours._rows = EngineRows(config_, Server())  # type: ignore[arg-type]
    change = BatchUpdate(rows, [], [added(row, wanted) for row in range(rows)], [])
    for one in processors.all:
        one.update_state(change)
    ones = torch.ones(rows)
    metadata = SamplingMetadata(
        temperature=ones,
        all_greedy=False,
        all_random=True,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=False,
        prompt_token_ids=torch.full((rows, 1), 7),
        frequency_penalties=0 * ones,
        presence_penalties=0 * ones,
        repetition_penalties=1.5 * ones,
        output_token_ids=[[] for _ in range(rows)],
        allowed_token_ids_mask=allowed,
        bad_words_token_ids={},
        logitsprocs=processors,
    )
    return Sampler()(logits.clone(), metadata).sampled_token_ids[:, 0]


@pytest.mark.parametrize("bias", [None, {5: -100.0, 6: -100.0}])
def test_steering_stays_among_the_allowed_tokens(bias: Any) -> None:
    """allowed_token_ids, logit_bias and penalties in vLLM's own sampler: token 11 is nearest
    the target, but not allowed; 3 and 5 are, and 5 is nearer unless its bias forbids it."""
    wanted = params(free(6) | {"length_policy": "greedy"}, logit_bias=bias)
    forbidden = torch.ones(20, V, dtype=torch.bool)
    forbidden[:, [3, 5, 20]] = False
    tokens = sampled(wanted, torch.zeros(20, V), forbidden)
    assert set(tokens.tolist()) == ({5} if bias is None else {3})


# ---- trouble


@pytest.fixture
def log() -> Iterator[list[logging.LogRecord]]:
    """What the plugin logs; vLLM's loggers do not propagate."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    level = engine_rows.logger.level
    engine_rows.logger.addHandler(handler)
    engine_rows.logger.setLevel(logging.INFO)
    yield records
    engine_rows.logger.removeHandler(handler)
    engine_rows.logger.setLevel(level)


@pytest.mark.parametrize("error", [TimedOut("slow"), RuntimeError("a bug")])
def test_trouble_and_recovery_are_logged_once(log: list[logging.LogRecord], error: Any) -> None:
    server = Server()
    served = processor_with(server)
    served.update_state(update(added=[added(0, params(9))]))
    for outage in range(2):
        for failure in (None, None, error, CircuitOpen("not yet"), TimedOut("again"), error):
            server.error = failure
            served.apply(torch.zeros(1, V))
        assert len(log) == 2 * outage + 1
        server.error = None
        for _ in range(3):
            served.apply(torch.zeros(1, V))
        assert len(log) == 2 * outage + 2
    assert [record.levelname for record in log] == ["ERROR", "INFO"] * 2
    assert f"{type(error).__name__}: {error}" in log[0].getMessage()
    assert "steered again" in log[1].getMessage()
    assert bool(log[0].exc_info) == isinstance(error, RuntimeError)  # a bug shows where it is


def test_a_request_that_nobody_validated_goes_on_unguided(log: list[logging.LogRecord]) -> None:
    """What is raised in the engine would end it."""
    served = processor_with(server := Server())
    served.update_state(update(added=[added(0, params({"length_target": 0}))]))
    logits = torch.randn(1, V)
    assert same_bits(apply(served, logits), logits)
    assert server.calls == 0
    assert "length_target.tokens" in log[0].getMessage()


def test_texts_that_have_no_values_are_counted_and_logged_once(
    log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = msgspec.structs.replace(INFO, max_sessions=2, max_position=10)
    monkeypatch.setattr(Server, "model", lambda self, fingerprint: few)
    served = processor_with(Server())
    counted: list[float] = []
    served._rows._counters.add = (  # type: ignore[method-assign]
        lambda name, amount=1.0: counted.append(amount) if name == "unguided_rows" else None
    )
    texts = [[7], [7], [7], [7] * 12, [7, V + 5], [7]]
    wishes = [params(free(30)) for _ in texts]
    wishes[5] = params(free(30) | {"length_every": 3})  # has no turn in the second step
    entries = [(row, wishes[row], text, []) for row, text in enumerate(texts)]
    served.update_state(update(added=entries))
    for output in (0, 1):
        served.apply(torch.zeros(len(texts), V))
        if output == 0:
            for *_, tokens in entries:
                tokens.append(9)
    assert counted == [4, 3]
    told = [record.getMessage() for record in log]
    assert len(told) == 3
    for reason in (
        "more rows than .* takes, 2",
        "longer than .* 10 tokens",
        "from 32",
    ):
        assert any(re.search(reason, line) for line in told), reason


def test_a_step_that_asks_nothing_is_no_recovery(log: list[logging.LogRecord]) -> None:
    server = Server(TimedOut("slow"))
    served = processor_with(server)
    served.update_state(update(added=[added(0, params(9), output := [])]))
    served.apply(torch.zeros(1, V))
    server.error = None
    output.append(-1)
    served.apply(torch.zeros(1, V))
    assert [record.levelname for record in log] == ["ERROR"]


def test_steering_resumes() -> None:
    server = Server(TimedOut("slow"))
    served = processor_with(server)
    served.update_state(update(added=[added(0, params(free(9)))]))
    logits = torch.randn(1, V)
    assert same_bits(apply(served, logits), logits)
    server.error = None
    assert not same_bits(apply(served, logits), logits)


# ---- several ranks


class Ranks:
    """A tensor-parallel group of two, one after the other: what rank 0 sends, rank 1 gets."""

    world_size = 2

    def __init__(self) -> None:
        self.rank_in_group = 0
        self.sent: Any = None

    def broadcast_object(self, value: Any, src: int) -> Any:
        assert src == 0
        if self.rank_in_group == 0:
            self.sent = value
        return self.sent


@pytest.mark.parametrize("error", [None, TimedOut("slow"), RuntimeError("bug")])
def test_one_rank_asks_for_all(monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    ranks = Ranks()
    monkeypatch.setattr(engine_rows, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(engine_rows, "get_tp_group", lambda: ranks)
    monkeypatch.setattr(engine_rows, "get_pp_group", lambda: SimpleNamespace(is_last_rank=True))
    logits = torch.randn(2, V)
    results = []
    for rank in range(2):
        ranks.rank_in_group = rank
        server = Server(error)
        served = processor_with(server)
        served.update_state(update(added=[added(0, params(9)), added(1, params(exactly(1)))]))
        results.append(apply(served, logits))
        assert server.calls == (rank == 0)
    assert same_bits(*results)
    assert (results[0][0] > -INF).sum() == (15 if error is None else V - 1)


# ---- construction and validation


def test_the_constructor_connects_to_nothing() -> None:
    """Nor does a batch without targets; a request with one does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        settings = {"url": f"http://127.0.0.1:{listener.getsockname()[1]}", "timeout_s": 0.05}
        served = LenvmLogitsProcessor(config(**settings), torch.device("cpu"), False)
        served.update_state(update(added=[added(0, params())]))
        served.apply(torch.zeros(1, V))
        with pytest.raises(BlockingIOError):
            listener.accept()
        served.update_state(update(added=[added(0, params(9))]))
        assert suppressed(served, 1) == {0: [EOS]}
        listener.accept()[0].close()


def test_an_unknown_setting_is_an_error() -> None:
    with pytest.raises(ValueError, match="ulr"):
        LenvmLogitsProcessor(config(ulr="http://x"), torch.device("cpu"), False)


@pytest.mark.parametrize(
    ("length", "fields", "message"),
    [
        ({"length_target": 0}, {}, "length_target.tokens: .* got 0"),
        ({"length_target": "many"}, {}, "length_target.tokens: .* got 'many'"),
        ({"length_targets": 9}, {}, "length_targets: unknown field, got 9"),
        ({"length_mode": "tilt"}, {}, "length_target.beta: required by mode 'tilt'"),
        (200, {"max_tokens": 100}, "max_tokens: 100 contradicts length_target"),
        (200, {"min_tokens": 221, "max_tokens": 300}, "min_tokens: 221 tokens before the end"),
        (200, {"ignore_eos": True, "max_tokens": 300}, "ignore_eos: true contradicts"),
        (200, {"max_tokens": 179}, "max_tokens: 179 contradicts .* at least 180"),
        (
            {"length_target": 50, "length_mode": "at_least"},
            {"max_tokens": 49},
            "max_tokens: 49 contradicts .* at least 50",
        ),
        (
            {"length_target": 50, "length_mode": "at_most"},
            {"min_tokens": 50, "max_tokens": 99},
            "min_tokens: 50 .* at most 50",
        ),
        (
            {"length_target": 50, "length_prefix_tokens": 55},
            {},
            "prefix_tokens: 55 leave no token .* at most 55",
        ),
        (
            {"length_target": 50, "length_prefix_tokens": 20},
            {"max_tokens": 24},
            "max_tokens: 24 .* at least 25",
        ),
    ],
)
def test_requests_that_are_refused(length: Any, fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LenvmLogitsProcessor.validate_params(params(length, **fields))


@pytest.mark.parametrize(
    ("length", "fields"),
    [
        (None, {}),
        ({"other": "x"}, {"ignore_eos": True}),
        (200, {"max_tokens": 220}),
        (200, {"max_tokens": None}),
        (free(200), {"max_tokens": 16}),
        ({"length_target": 50, "length_prefix_tokens": 20}, {"max_tokens": 25}),
        ({"length_mode": "tilt", "length_beta": -3}, {}),
    ],
)
def test_requests_that_are_taken(length: Any, fields: Any) -> None:
    LenvmLogitsProcessor.validate_params(params(length, **fields))


def test_a_tokenizer_that_cannot_decode_its_tokens(
    log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves the texts without leads to their ends, and vLLM with a plugin that starts."""
    tokenizer = SimpleNamespace(encode=lambda text, **_: [1], decode=lambda ids, **_: 1 / 0)
    monkeypatch.setattr(engine_rows, "tokenizer_of", lambda vllm_config: tokenizer)
    EngineRows(config(), Server())
    (record,) = log
    assert "no ends of sentences, words or characters (" in record.getMessage()


# ---- the way into vLLM


def test_one_name_for_both_model_runners() -> None:
    """What the loader of this one makes; that of the other stands in test_v2."""
    served = config()
    served.scheduler_config = SimpleNamespace(max_num_seqs=4)
    made = build_logitsprocs(served, torch.device("cpu"), False, False, (PROCESSOR,))
    assert [isinstance(p, V1Processor) for p in made.non_argmax_invariant].count(True) == 1


def test_vllm_finds_the_processor_by_its_full_name() -> None:
    assert _load_logitsprocs_by_fqcns([PROCESSOR]) == [lenvm_vllm.LenvmLogitsProcessor]
    assert issubclass(LenvmLogitsProcessor, LogitsProcessor)
    assert not processor_with(Server()).is_argmax_invariant()
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        lenvm_vllm.Other  # noqa: B018


@pytest.mark.parametrize(
    ("names", "full"),
    [
        (None, None),
        ([], []),
        (["lenvm_vllm"], [PROCESSOR]),
        ([PROCESSOR], [PROCESSOR]),
        (["a:B", "lenvm_vllm"], ["a:B", PROCESSOR]),
        (["lenvm_vllm", "a:B", PROCESSOR, "lenvm_vllm"], [PROCESSOR, "a:B"]),
        (["a:B", "a:B", dict], ["a:B", "a:B", dict]),
        (["lenvm_vllm.other:X"], ["lenvm_vllm.other:X"]),
    ],
)
def test_complete_names(names: Any, full: Any) -> None:
    given_names = None if names is None else list(names)
    assert complete_names(names) == full
    assert complete_names(full) == full
    assert names == given_names


@pytest.fixture
def registered() -> None:
    register()


@pytest.mark.usefixtures("registered")
def test_register_is_idempotent() -> None:
    hooks = EngineArgs.from_cli_args.__func__, EngineArgs.create_engine_config
    register()
    assert (EngineArgs.from_cli_args.__func__, EngineArgs.create_engine_config) == hooks


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", [EngineArgs, AsyncEngineArgs])
def test_the_command_line_completes_the_bare_name(kind: Any) -> None:
    args = argparse.Namespace(model="m", logits_processors=["lenvm_vllm"], middleware=["a.B"])
    for _ in range(2):
        made = kind.from_cli_args(args)
        assert type(made) is kind
        assert made.model == "m"
        assert made.logits_processors == [PROCESSOR]
        assert args.middleware == ["a.B", MIDDLEWARE]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("names", [None, [], ["a:B"]])
def test_without_the_plugin_the_command_line_stays(names: Any) -> None:
    args = argparse.Namespace(model="m", logits_processors=names, middleware=[])
    assert AsyncEngineArgs.from_cli_args(args).logits_processors == names
    assert args.middleware == []


@pytest.mark.usefixtures("registered")
def test_without_an_http_server_there_is_no_middleware() -> None:
    args = argparse.Namespace(model="m", logits_processors=["lenvm_vllm"])
    assert EngineArgs.from_cli_args(args).logits_processors == [PROCESSOR]
    assert not hasattr(args, "middleware")


def test_the_middlewares_name() -> None:
    module, name = MIDDLEWARE.rsplit(".", 1)
    assert module == plugin.__name__
    assert hasattr(plugin, name)


@pytest.mark.usefixtures("registered")
def test_the_config_has_the_full_name_and_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a command line."""
    monkeypatch.setattr(served, "config", None)
    args = AsyncEngineArgs(model=str(tiny_llm(tmp_path)), logits_processors=[plugin.BARE])
    made = args.create_engine_config()
    assert made.model_config.logits_processors == [PROCESSOR]
    assert served.config is made


@pytest.mark.parametrize("target", [9, {"length_mode": "tilt", "length_beta": 1.0}])
def test_no_guidance_of_drafts(target: Any) -> None:
    for drafts in (None, object()):
        made = config()
        made.speculative_config = drafts
        wishes = [params(), params(target)]
        for wanted in wishes if drafts is None else wishes[:1]:
            take_in(made, SimpleNamespace(sampling_params=wanted, prompt_token_ids=[7]))
        refused = SimpleNamespace(sampling_params=params(target), prompt_token_ids=[7])
        if drafts is not None:
            with pytest.raises(ValueError, match=r"length_target: .* speculative decoding"):
                take_in(made, refused)


def test_the_fingerprint_is_that_of_the_served_tokenizer(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    served = SimpleNamespace(
        model=str(tmp_path),
        tokenizer=str(tmp_path),
        tokenizer_mode="hf",
        tokenizer_revision=None,
        trust_remote_code=False,
        runner_type="generate",
        skip_tokenizer_init=False,
    )
    vllm_config = SimpleNamespace(model_config=served)
    fingerprint = tokenizer_fingerprint(tokenizer_of(vllm_config))
    assert fingerprint == tokenizer_fingerprint(tiny_tokenizer())
    served.skip_tokenizer_init = True
    assert tokenizer_of(vllm_config) is None
