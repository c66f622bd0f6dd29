"""Bad weather: values that are missing, wishes that nobody validated, several ranks."""

import logging
import re
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from lenvm_vllm.engine import ranks as vllm_ranks
from lenvm_vllm.engine import rows as engine_rows
from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.values.client import CircuitOpen, TimedOut
from tests.support.fakes import (
    INFO,
    Server,
    V,
    config,
    exactly,
    free,
    params,
    replicas_of,
    same_bits,
)
from tests.support.v1_batch import added, apply, processor_with, update


def of_all(log: list[logging.LogRecord]) -> list[logging.LogRecord]:
    """What is said of all requests, and not of one server."""
    return [record for record in log if record.msg.startswith("length targets:")]


@pytest.mark.parametrize("error", [TimedOut("slow"), RuntimeError("a bug")])
def test_trouble_and_recovery_are_logged_once(log: list[logging.LogRecord], error: Any) -> None:
    server = Server()
    served = processor_with(server)
    served.update_state(update(added=[added(0, params(9))]))
    for outage in range(2):
        for failure in (None, None, error, CircuitOpen("not yet"), TimedOut("again"), error):
            server.error = failure
            served.apply(torch.zeros(1, V))
        assert len(of_all(log)) == 2 * outage + 1
        server.error = None
        for _ in range(3):
            served.apply(torch.zeros(1, V))
        assert len(of_all(log)) == 2 * outage + 2
    told = of_all(log)
    assert [record.levelname for record in told] == ["ERROR", "INFO"] * 2
    assert f"{type(error).__name__}: {error}" in told[0].getMessage()
    assert "steered again" in told[1].getMessage()
    assert bool(told[0].exc_info) == isinstance(error, RuntimeError)  # a bug shows where it is


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
    few = msgspec.structs.replace(INFO, max_position=10)
    monkeypatch.setattr(Server, "model", lambda self, fingerprint: few)
    served = processor_with(Server())
    counted: list[float] = []
    served.batch.rows._counters.add = lambda name, amount=1.0: (
        counted.append(amount) if name == "unguided_rows" else None
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
    assert counted == [2, 2]
    told = [record.getMessage() for record in log]
    assert len(told) == 2
    for reason in ("longer than .* 10 tokens", "from 32"):
        assert any(re.search(reason, line) for line in told), reason


def test_a_step_that_asks_nothing_is_no_recovery(log: list[logging.LogRecord]) -> None:
    server = Server(TimedOut("slow"))
    served = processor_with(server)
    served.update_state(update(added=[added(0, params(9), output := [])]))
    served.apply(torch.zeros(1, V))
    server.error = None
    output.append(-1)
    served.apply(torch.zeros(1, V))
    assert [record.levelname for record in of_all(log)] == ["ERROR"]


def test_steering_resumes() -> None:
    server = Server(TimedOut("slow"))
    served = processor_with(server)
    served.update_state(update(added=[added(0, params(free(9)))]))
    logits = torch.randn(1, V)
    without = apply(served, logits)
    server.error = None
    assert not same_bits(apply(served, logits), without)


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
    monkeypatch.setattr(vllm_ranks, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(vllm_ranks, "get_tp_group", lambda: ranks)
    monkeypatch.setattr(vllm_ranks, "get_pp_group", lambda: SimpleNamespace(is_last_rank=True))
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
    # Where no bug is in the way, the candidates are cut also without values.
    bug = isinstance(error, RuntimeError)
    assert results[0][0].isfinite().sum() == (V - 1 if bug else 15)


def test_a_tokenizer_that_cannot_decode_its_tokens(
    log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves the texts without leads to their ends, and vLLM with a plugin that starts."""
    tokenizer = SimpleNamespace(encode=lambda text, **_: [1], decode=lambda ids, **_: 1 / 0)
    monkeypatch.setattr(engine_rows, "tokenizer_of", lambda vllm_config: tokenizer)
    EngineRows(config(), replicas_of(Server()))
    (record,) = log
    assert "cannot read the tokenizer's texts (" in record.getMessage()
