"""Prompts with pictures, sound or video, beside a value model that reads text alone.

Legend: V vocabulary. Token 0 is the end; token x is worth x more tokens.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams

from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.engine.v2 import V2Slots
from lenvm_vllm.target.request import MEDIA, UNSEEN
from lenvm_vllm.telemetry.metrics import FOLDER, exposition
from lenvm_vllm.telemetry.progress import KEY, Known
from lenvm_vllm.values.client import TimedOut
from tests.support.fakes import Server, V, config, exactly, free, params, replicas_of, same_bits
from tests.support.v1_batch import processor_with, update
from tests.support.v2_slots import Runner
from value_server.contract import wire

PICTURE = 31  # its token in prompts
Texts = list[tuple[SamplingParams, list[int], list[int]]]  # parameters, prompt, output


def with_media(length: dict[str, Any]) -> SamplingParams:
    return params(length | {MEDIA: [UNSEEN]})


def v1(server: Server, texts: Texts, rows: EngineRows | None = None) -> Callable[[Tensor], Tensor]:
    served = processor_with(server)
    served.batch.rows = rows or served.batch.rows
    served.update_state(update(added=[(row, *text) for row, text in enumerate(texts)]))
    return lambda logits: served.apply(logits.clone())


def v2(server: Server, texts: Texts, rows: EngineRows | None = None) -> Callable[[Tensor], Tensor]:
    runner = Runner(server)
    runner.served.batch = V2Slots(rows or runner.served.batch.rows, runner.slots)
    for slot, text in enumerate(texts):
        runner.add(slot, *text)
    return lambda logits: runner.step(*range(len(texts)), logits=logits)


both = pytest.mark.parametrize("runner", [v1, v2])


def asked(server: Server) -> list[int]:
    """Tokens of all texts that it was told of."""
    return [n for request in server.requests for n in request.token_counts]


@both
def test_nothing_of_it_is_sent_and_its_neighbour_has_values(runner: Any) -> None:
    torch.manual_seed(0)
    server, logits = Server(), torch.randn(2, V)
    texts: Texts = [(with_media(free(9)), [7, PICTURE, 8], []), (params(free(9)), [7, 8], [])]
    steered = runner(server, texts)(logits)
    assert asked(server) == [2]
    assert not same_bits(steered[1], logits[1])
    (alone,) = runner(Server(), texts[1:])(logits[1:])
    assert same_bits(steered[1], alone)


@both
@pytest.mark.parametrize("tokens", [3, 9, 10, 11])
def test_it_is_led_as_a_text_whose_values_are_missing(runner: Any, tokens: int) -> None:
    """Before its landing, in it, and at its end."""
    torch.manual_seed(tokens)
    logits, target = torch.randn(1, V), {"length_target": 10}
    prompt, output = [7, PICTURE, 8], [9] * tokens
    got = runner(server := Server(), [(with_media(target), prompt, output)])(logits)
    lost = runner(Server(TimedOut("slow")), [(params(target), prompt, output)])(logits)
    assert same_bits(got, lost)
    assert not same_bits(got, logits)
    assert not server.requests
    ended = runner(server, [(with_media(exactly(4)), prompt, [9] * 3)])(logits)
    assert ended[0].isfinite().nonzero().tolist() == [[0]]


@both
def test_it_is_counted_and_told_and_logged_once(
    runner: Any, log: list[logging.LogRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    keys = ["0" * 31 + digit for digit in "12"]
    texts: Texts = [
        (with_media(free(9) | {KEY: keys[0]}), [7, PICTURE], []),
        (params(free(9) | {KEY: keys[1]}), [7], []),
        (with_media(free(9)), [7, PICTURE], []),
        (with_media({"length_target": 9, "length_policy": "landing"}), [7, PICTURE], []),
    ]
    step = runner(Server(), texts)
    for _ in range(3):
        step(torch.zeros(4, V))
    assert b"\nlenvm_unseen_requests_total 2.0\n" in exposition()
    (line,) = [record.getMessage() for record in log if "pictures" in record.getMessage()]
    assert "led without values" in line
    known = Known()
    steps = [known.step(key, None, 1) for key in keys]
    assert [step and step.unseen for step in steps] == [True, False]


@both
def test_what_nobody_told_of_is_known_by_its_placeholder(runner: Any) -> None:
    served = config(v2=runner is v2)
    served.model_config.hf_config = SimpleNamespace(image_token_id=PICTURE)
    rows = EngineRows(served, replicas_of(server := Server()))
    texts: Texts = [(params(free(9)), [7, PICTURE, 8], []), (params(free(9)), [7, 8], [PICTURE])]
    runner(server, texts, rows)(torch.zeros(2, V))
    assert asked(server) == [3]


@both
def test_it_is_not_told_ahead_either(runner: Any) -> None:
    """A long text is, before vLLM's forward pass."""
    server = Server(lookahead_rank=2)
    step = runner(server, [(with_media(free(9)), [7] * 20, []), (params(free(9)), [8] * 20, [])])
    for _ in range(3):
        step(torch.zeros(2, V))
    sent = {token for r in server.requests for token in wire.unpack_ids(r.tokens).tolist()}
    assert sent == {8}


def test_the_server_does_not_hear_that_it_is_over() -> None:
    served = processor_with(server := Server(lookahead_rank=2))
    wishes = with_media(free(9)), params(free(9))
    rows = [(row, wanted, [7] * 20, []) for row, wanted in enumerate(wishes)]
    served.update_state(update(added=rows))
    served.apply(torch.zeros(2, V))
    (known,) = server.sessions
    served.update_state(update(removed=[0, 1], added=[(0, params(free(9)), [7], [])]))
    served.apply(torch.zeros(1, V))
    assert [name for request in server.requests for name in request.closed] == [known]


@pytest.mark.parametrize("told", [5, "x", None, [[1]], {"a": 1}])
def test_what_is_told_amiss_ends_no_engine(told: Any) -> None:
    """By a front end that does not pass through `intake`."""
    v1(Server(), [(params(free(9) | {MEDIA: told}), [7], [])])(torch.zeros(1, V))
