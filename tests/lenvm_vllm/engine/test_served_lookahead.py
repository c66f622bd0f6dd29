"""The plugin's texts with a real value server whose model has a lookahead head."""

import torch
import uvicorn

from lenvm_vllm.engine.sessions import Sessions
from lenvm_vllm.telemetry.metrics import Counters
from lenvm_vllm.values.client import ValueClient
from lenvm_vllm.values.replicas import Replicas
from tests.support import tiny
from tests.support.toy import SECONDS, request, tell, values
from tests.support.value_servers import in_thread
from value_server.engine.engine import Engine
from value_server.http.app import create_app
from value_server.http.models import ServedModel
from value_server.http.text import Texts
from value_server.model.lookahead import logits_after


@torch.inference_mode()
def naive(text: list[int], tokens: list[int]) -> torch.Tensor:
    """(K,) logits after each token."""
    model = tiny.tiny_lookahead()
    assert model.lookahead is not None
    state = model.backbone(input_ids=torch.tensor([text])).last_hidden_state[0, -1]
    embeddings = model.backbone.get_input_embeddings()(torch.tensor(tokens))
    keys = model.lookahead.keys(embeddings).half().float()  # as they are told
    return logits_after(model.lookahead(state), keys).double()


def test_values_are_those_of_the_head_whether_told_ahead_or_asked_in_the_step() -> None:
    served = ServedModel.of(Engine(tiny.tiny_lookahead(), slots=400), Texts(None))
    app = create_app({"": served})
    states = [request(prompt=[n + 1, 2]) for n in range(3)]
    with in_thread(uvicorn.Server(uvicorn.Config(app, log_level="warning"))) as (url, _):
        replicas = Replicas({url: ValueClient(url, timeout_s=SECONDS)})
        sessions = Sessions(replicas, lambda: None, Counters())
        for step in range(4):
            if step % 2:
                tell(sessions, states[: step + 1], 1.0)
            z = values(sessions, states)
            for state, mine in zip(states, z, strict=True):
                text = [*(state.prompt_ids or []), *state.output_ids]
                expected = naive(text, [10, 20, 40, 80])
                torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)
                state.output_ids.append(10 * step + 5)
