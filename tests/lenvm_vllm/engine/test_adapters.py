"""Whose values the texts of a LoRA adapter have: the base model's, or those of servers of its own.

Legend: V vocabulary.
"""

import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from lenvm_vllm.api.intake import take_in
from lenvm_vllm.engine import sessions
from lenvm_vllm.engine.processor import LenvmLogitsProcessor
from lenvm_vllm.values.client import Unreachable
from lenvm_vllm.values.replicas import Replicas
from tests.support.blocked import wait_until
from tests.support.fakes import Server, V, config, entering, free, params
from tests.support.v1_batch import added, update

BASE, OWN, THIRD = "http://base", "http://own", "http://third"
gone = Unreachable("gone")


def written_by(adapter: str | None) -> SamplingParams:
    """What the engine gets of a request to this adapter, whose session then begins with its
    name."""
    wanted = params(free(9) | {"lenvm_request_id": adapter or "base"})
    request = entering(wanted, [7, 8], lora_request=adapter and LoRARequest(adapter, 1, "/nowhere"))
    take_in(config(), request)
    return wanted


def served_by(
    adapters: dict[str, list[str]], lost: tuple[str, ...] = ()
) -> tuple[dict[str, Server], LenvmLogitsProcessor]:
    servers = {url: Server(gone if url in lost else None) for url in (BASE, OWN, THIRD)}
    client = Replicas(servers, adapters={"": [BASE]} | adapters)
    processor = LenvmLogitsProcessor(config(), torch.device("cpu"), False, client=client)
    names = (None, "sql", "other")
    processor.update_state(
        update(added=[added(row, written_by(name)) for row, name in enumerate(names)])
    )
    return servers, processor


def held(server: Server) -> set[str]:
    """Adapters of the texts that it has."""
    return {session.partition(".")[0] for session in server.sessions}


def step(processor: LenvmLogitsProcessor) -> int:
    """Rows that were steered."""
    logits = torch.zeros(3, V)
    return int((processor.apply(logits.clone()) != logits).any(-1).sum())


def test_one_value_model_is_for_all_adapters_of_a_base() -> None:
    servers, processor = served_by({})
    assert step(processor) == 3
    assert held(servers[BASE]) == {"base", "sql", "other"}
    assert not held(servers[OWN])


def test_an_adapter_may_have_its_own() -> None:
    servers, processor = served_by({"sql": [OWN]})
    assert step(processor) == 3
    assert held(servers[BASE]) == {"base", "other"}
    assert held(servers[OWN]) == {"sql"}
    processor.update_state(update(removed=[0, 1]))
    step(processor)
    assert (held(servers[BASE]), held(servers[OWN])) == ({"other"}, set())


def test_an_adapter_whose_own_is_lost_has_that_of_the_others() -> None:
    servers, processor = served_by({"sql": [OWN]})
    step(processor)
    servers[OWN].error = gone
    assert step(processor) == 3
    assert held(servers[BASE]) == {"base", "sql", "other"}


def test_the_values_of_another_adapter_are_for_no_text_but_its_own() -> None:
    servers, processor = served_by({"sql": [OWN], "law": [THIRD]}, lost=(BASE,))
    step(processor)
    assert (held(servers[OWN]), held(servers[THIRD])) == ({"sql"}, set())
    servers[OWN].error = gone
    step(processor)
    assert not held(servers[THIRD])
    servers[BASE].error = None
    client = processor.batch.rows._client
    wait_until(lambda: client.model(lambda: None) is not None and BASE in client.live)
    assert step(processor) == 3
    assert held(servers[BASE]) == {"base", "sql", "other"}


def test_texts_that_no_server_is_for_take_no_room_in_messages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "PIECE", 3)  # each text has two tokens
    servers, processor = served_by({"sql": [OWN]}, lost=(BASE,))
    step(processor)
    assert servers[OWN].last is not None
    assert servers[OWN].last.token_counts == [2]


def test_a_client_names_no_adapter() -> None:
    wanted = params(free(9) | {"lenvm_adapter": "sql"})
    take_in(config(), entering(wanted))
    assert wanted.extra_args is not None
    assert wanted.extra_args["lenvm_adapter"] == ""
