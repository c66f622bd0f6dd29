"""Model Runner V2: requests in slots, with vLLM's own loader and interface (`v2_slots.py`)."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.v1.worker.gpu.sample.logits_processor import (
    build_custom_logits_processors_params_validator,
)

from lenvm_vllm.api.intake import take_in
from lenvm_vllm.engine.processor import LenvmLogitsProcessor
from lenvm_vllm.engine.v2 import NEWEST
from lenvm_vllm.plugin import PROCESSOR
from lenvm_vllm.values.client import TimedOut
from tests.support.fakes import EOS, Server, V, config, entering, exactly, free, params, same_bits
from tests.support.toy import settle
from tests.support.v2_slots import SLOTS, Runner, load
from value_server.contract import wire

quick = settings(deadline=None, max_examples=40)


def told(server: Server) -> list[list[int]]:
    """The tokens that the last call told of each row."""
    assert server.last is not None
    return tokens_of(server.last)


def tokens_of(request: wire.StepRequest) -> list[list[int]]:
    tokens = iter(wire.unpack_ids(request.tokens).tolist())
    return [[next(tokens) for _ in range(count)] for count in request.token_counts]


def open_tokens(row: Tensor) -> list[int]:
    return row.isfinite().nonzero()[:, 0].tolist()


# ---- the way in


def test_the_class_itself_is_taken_too() -> None:
    load(Runner(Server()).slots, LenvmLogitsProcessor)


def test_a_step_without_values_is_cut_by_the_plugin() -> None:
    """vLLM is not told of the cut, which it would apply to steered rows, too."""
    runner = Runner(Server(TimedOut("slow")))
    request = entering(params(free(9), top_k=3), [7, 8])
    take_in(config(v2=True), request)
    runner.add(0, request.sampling_params)
    runner.add(1, params(top_k=3))
    logits = torch.arange(2 * V, dtype=torch.float32).reshape(2, V) / 10
    after = runner.step(0, 1, logits=logits)
    assert open_tokens(after[0]) == [V - 3, V - 2, V - 1]
    assert same_bits(after[1], logits[1])


def test_wrong_requests_are_refused_at_admission() -> None:
    validate = build_custom_logits_processors_params_validator([PROCESSOR])
    validate(params())
    validate(params(9))
    with pytest.raises(VLLMValidationError, match=r"length_target\.tokens: .* got 0"):
        validate(params({"length_target": 0}))


# ---- requests and slots


def test_unguided_requests_are_declined() -> None:
    runner = Runner(server := Server())
    assert not runner.add(0, params())
    assert runner.add(1, params(9))
    logits = torch.randn(2, V)
    assert same_bits(runner.step(0, logits=logits[:1]), logits[:1])
    assert server.calls == 0
    after = runner.step(0, 1, logits=logits)
    assert same_bits(after[0], logits[0])
    assert not same_bits(after[1], logits[1])


def test_each_token_is_told_once_in_whatever_row_it_is() -> None:
    runner = Runner(server := Server())
    runner.add(3, params(free(20)), prompt=[7, 8, 9])
    runner.add(1, params(free(20)), prompt=[5])
    runner.step(3, 1)
    assert told(server) == [[7, 8, 9], [5]]
    runner.append(3, 11)
    runner.append(1, 12)
    runner.step(1, 3)
    assert told(server) == [[12], [11]]
    runner.append(1, 13)
    runner.step(1)
    assert told(server) == [[13]]
    assert len(server.sessions) == 2


def test_with_lookahead_the_newest_token_is_told_before_the_forward_pass() -> None:
    runner = Runner(server := Server(lookahead_rank=2))
    for slot in (3, 1):
        runner.add(slot, params(free(20)), prompt=[slot])
    for token in (11, 12):  # after which the length of a step is known
        runner.step(3, 1)
        runner.append(3, token)
        runner.append(1, token + 10)
    server.requests.clear()
    runner.served.apply_staged_writes()
    settle(runner.served.batch.rows._sessions)
    assert [tokens_of(request) for request in server.requests] == [[[22], [12]]]
    runner.step(3, 1)
    assert all(tokens_of(request) == [[], []] for request in server.requests[1:])
    # The slot goes to another one: what was read of its text is not read again.
    runner.append(1, 30)
    runner.served.apply_staged_writes()
    (state,) = (s for s in runner.served.batch._states.values() if s.prompt_ids == [1])
    runner.add(1, params())
    assert state.output_ids == [21, 22, 30]


def test_with_exact_scoring_the_newest_token_is_sent_for_before_the_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is launched after the forward pass comes after it."""
    runner = Runner(server := Server())
    runner.add(1, params(free(20)))
    runner.step(1)
    runner.append(1, 11)
    batch = runner.served.batch
    runner.served.apply_staged_writes()
    monkeypatch.setattr(runner.served, "apply_staged_writes", lambda: None)
    batch._slots.all_token_ids.gpu = batch._slots.total_len.gpu = None  # nobody reads it
    runner.step(1)
    assert told(server) == [[11]]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_text_that_grew_by_many_tokens(rank: int) -> None:
    runner = Runner(server := Server(lookahead_rank=rank))
    runner.add(1, params(free(40)))
    runner.step(1)
    (state,) = runner.served.batch._states.values()
    for tokens in ([11, 12], list(range(13, 13 + 2 * NEWEST))):
        for token in tokens:
            runner.append(1, token)
        runner.step(1)
        assert state.output_ids[-len(tokens) :] == tokens
    assert server.calls


def test_steps_without_guided_rows_read_the_device_once_and_tell_nothing_twice() -> None:
    """vLLM then does not steer; nor does it tell that the guided request has ended."""
    runner = Runner(server := Server(lookahead_rank=2))
    runner.add(1, params(free(20)))
    for token in (11, 12):  # after which the length of a step is known
        runner.step(1)
        runner.append(1, token)
    batch = runner.served.batch
    runner.served.apply_staged_writes()
    settle(batch.rows._sessions)
    batch._slots.all_token_ids.gpu = batch._slots.total_len.gpu = None  # nobody reads it
    before = len(server.requests)
    for _ in range(3):
        runner.served.apply_staged_writes()
        settle(batch.rows._sessions)
    assert len(server.requests) == before


def test_a_slot_that_goes_to_another_request() -> None:
    """Nothing told that the first one ended: neither its text nor its session may stay."""
    runner = Runner(server := Server())
    runner.add(2, params(free(20)), prompt=[7, 8])
    runner.step(2)
    (before,) = server.sessions
    runner.append(2, 11)
    runner.add(2, params(free(20)), prompt=[5, 6, 4])
    runner.step(2)
    assert told(server) == [[5, 6, 4]]
    assert server.last is not None
    assert server.last.closed == [before]
    assert len(server.sessions) == 1


def test_a_slot_that_goes_to_an_unguided_request() -> None:
    runner = Runner(server := Server())
    runner.add(2, params(9))
    runner.step(2)
    (before,) = server.sessions
    runner.add(2, params())
    logits = torch.randn(1, V)
    assert same_bits(runner.step(2, logits=logits), logits)
    runner.add(0, params(9))
    runner.step(0)
    assert server.last is not None
    assert server.last.closed == [before]


def test_a_preempted_request_goes_on_where_it_was() -> None:
    """It comes back with its output so far as part of what is computed again."""
    runner = Runner(server := Server())
    runner.add(4, params(exactly(4)), prompt=[7, 8], output=[9, 10])
    after = runner.step(4)
    assert EOS not in open_tokens(after[0])
    assert told(server) == [[7, 8, 9, 10]]
    runner.append(4, 11)
    assert open_tokens(runner.step(4)[0]) == [EOS]


def test_a_prompt_in_parts_is_left_alone_until_its_last() -> None:
    runner = Runner(server := Server())
    runner.add(0, params(exactly(1)), prompt=[7] * 10)
    runner.add(1, params(exactly(9)), prompt=[5])
    for computed in (4, 8):
        after = runner.step(0, 1, s0=computed)
        assert len(open_tokens(after[0])) == V
        assert EOS not in open_tokens(after[1])
        runner.append(1, 20)
    assert open_tokens(runner.step(0, 1, s0=10)[0]) == [EOS]
    assert told(server) == [[20]]


def test_rails_land_exactly() -> None:
    rng = random.Random(0)
    runner = Runner(Server())
    targets = dict(enumerate((1, 2, 7, 20)))
    for slot, tokens in targets.items():
        runner.add(slot, params(exactly(tokens), temperature=0.8))
    running, ended = list(targets), dict[int, int]()
    while running:
        rng.shuffle(running)
        p = torch.softmax(runner.step(*running).double() / 0.8, dim=-1).tolist()
        for slot, row in zip(list(running), p, strict=True):
            runner.append(slot, token := rng.choices(range(V), row)[0])
            if token == EOS:
                running.remove(slot)
                ended[slot] = runner.lengths[slot] - 2
    assert ended == targets


@quick
@given(st.randoms(use_true_random=True), st.sampled_from([0, 2]))
def test_any_history_of_slots(rng: random.Random, rank: int) -> None:
    """The server knows, for each guided request, its text and no other; the newest token may come
    with the next message, since a server has one at a time."""
    server = Server(lookahead_rank=rank)
    runner, texts = Runner(server), dict[int, list[int]]()
    guided = set[int]()
    known = dict[str, list[int]]()
    for _ in range(12):
        for slot in rng.sample(range(SLOTS), rng.randint(0, 2)):
            texts[slot] = [rng.randrange(1, V) for _ in range(rng.randint(1, 4))]
            wanted = rng.choice([params(), params(free(30))])
            guided.discard(slot)
            if runner.add(slot, wanted, prompt=texts[slot]):
                guided.add(slot)
        batch = rng.sample(sorted(texts), rng.randint(0, len(texts)))
        runner.step(*batch)
        # One that was told ahead of the step may still be on its way: it is looked at next time.
        for request in [server.requests.pop(0) for _ in list(server.requests)]:
            for session, start, tokens in zip(
                request.sessions, request.starts, tokens_of(request), strict=True
            ):
                assert start <= len(known.get(session, []))
                known[session] = known.get(session, [])[:start] + tokens
        for slot in guided.intersection(batch):
            told_of = known.get(runner.served.batch._states[slot].session, [])
            assert told_of == texts[slot][: len(told_of)]
        for slot in batch:
            texts[slot].append(token := rng.randrange(1, V))
            runner.append(slot, token)
