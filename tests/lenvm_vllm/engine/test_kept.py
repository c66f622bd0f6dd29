"""What stays of a step: nothing of its logits, though no value server answers."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from vllm.sampling_params import SamplingParams

from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.values.client import Refused, TimedOut, ValueServerError
from tests.support import fakes


@pytest.fixture
def _no_collection() -> Iterator[None]:
    """What only a collection would free stays too long: a batch's logits are up to 150 MB."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize("rests", [False, True])
@pytest.mark.parametrize("error", [TimedOut("slow"), Refused("not found", 404)])
def test_no_logits_stay(error: ValueServerError, rests: bool) -> None:
    server = fakes.Server(error)
    rows = EngineRows(fakes.config(), fakes.replicas_of(server))
    made = SamplingParams(max_tokens=400)
    made.extra_args = LengthTarget.parse({"tokens": 60}).to_xargs()
    made.update_from_generation_config({}, 0)
    state = rows.open(made, [1, 2], [])

    def step() -> weakref.ref[torch.Tensor]:
        logits = torch.zeros(1, fakes.INFO.vocab_size)
        rows.tell([state])
        rows.steer_inplace(logits, {0: state})
        state.output_ids.append(5)
        return weakref.ref(logits)

    seen = [step()]
    server.rests = rests  # a server that has failed is not asked for a moment
    seen += [step() for _ in range(20)]
    assert not [logits for logits in seen if logits() is not None]
