"""What a step does to rows: left alone, steered, railed; and by vLLM's own sampler.

Legend: V vocabulary. Token 0 is the end; token x is worth x more tokens.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    build_logitsprocs,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from lenvm_vllm.engine.processor import LenvmLogitsProcessor
from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.plugin import PROCESSOR
from tests.support.fakes import (
    EOS,
    Server,
    V,
    config,
    exactly,
    free,
    params,
    replicas_of,
    same_bits,
)
from tests.support.v1_batch import added, apply, processor_with, rails_only, update
from value_server.contract import wire

INF = math.inf
quick = settings(deadline=None, max_examples=40)


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
    assert served.batch.rows._plans._trouble is None


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
    ours = next(p for p in processors.non_argmax_invariant if isinstance(p, LenvmLogitsProcessor))
    ours.batch.rows = EngineRows(config_, replicas_of(Server()))
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
