"""What HTTP adds to a step: a real server process against the engine in this one, same steps.

    python -m benchmarks.systems.http_overhead

The model is random and tiny (1 layer of 64), so that the rest is what is seen: encoding, the
socket, uvicorn, the thread of the engine, decoding.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cyclopts import App
from transformers import LlamaConfig, LlamaModel

from lenvm_vllm.commands.processes import VALUE_SERVER, free_port, running
from lenvm_vllm.values.client import ValueClient
from value_server.contract import wire
from value_server.contract.checkpoint import LenvmConfig
from value_server.engine.engine import Engine
from value_server.engine.job import Job, Row
from value_server.model.value_model import ValueHead, ValueModel

app = App(help=__doc__)
PROMPT = list(range(100, 228))
STEPS, WARM = 300, 50


def tiny_model() -> ValueModel:
    """Random; without a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=4096,
    )
    facts = LenvmConfig(
        gamma=0.99, base_model="", weights="full", num_layers=1, tokenizer_fingerprint=""
    )
    return ValueModel(LlamaModel(config), ValueHead(64), facts).eval()


def p50_ms(step: Callable[[int], object]) -> float:
    """Median time of `step(number)`."""
    times = []
    for number in range(STEPS):
        begin = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times[WARM:])


def engine_ms(sessions: int, candidates: list[int]) -> float:
    """Without HTTP."""
    engine = Engine(tiny_model(), slots=1 << 16)
    engine.warm_up()
    names = [f"s{i}" for i in range(sessions)]

    def step(number: int) -> None:
        start, tokens = (len(PROMPT) + number - 1, candidates[:1]) if number else (0, PROMPT)
        engine.run(Job([Row(name, start, tokens, candidates) for name in names]))

    return p50_ms(step)


def http_ms(client: ValueClient, sessions: int, candidates: list[int]) -> float:
    """With the plugin's client on a connection that stays open."""
    names = [f"s{i}" for i in range(sessions)]

    def step(number: int) -> None:
        start, tokens = (len(PROMPT) + number - 1, candidates[:1]) if number else (0, PROMPT)
        client.step(
            wire.StepRequest(
                sessions=names,
                starts=[start] * sessions,
                token_counts=[len(tokens)] * sessions,
                tokens=wire.pack_ids(tokens * sessions),
                candidate_counts=[len(candidates)] * sessions,
                candidates=wire.pack_ids(candidates * sessions),
            )
        )

    return p50_ms(step)


def overhead_ms(sessions: int = 32, candidates: int = 15) -> dict[str, float]:
    """p50 of a step over TCP and over a Unix socket, less that of the engine alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ids = list(range(1000, 1000 + candidates))
    alone = engine_ms(sessions, ids)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model().save(folder / "model")
        port, socket = free_port(), folder / "socket"
        command = [*VALUE_SERVER, str(folder / "model"), "--threads", "1", "--dtype", "float32"]
        url = f"http://127.0.0.1:{port}"
        with running([*command, "--port", str(port)], f"{url}/ready", folder / "tcp.log"):
            tcp = http_ms(ValueClient(url, timeout_s=60), sessions, ids)
        ready = f"http://127.0.0.1:{port}/ready"
        with running([*command, "--uds", str(socket)], ready, folder / "uds.log", uds=socket):
            unix = http_ms(ValueClient(f"unix:{socket}", timeout_s=60), sessions, ids)
    return {"engine": alone, "tcp": tcp - alone, "unix": unix - alone}


@app.default
def main(*, sessions: int = 32, candidates: int = 15) -> None:
    """Measure and print one JSON line.

    Parameters
    ----------
    sessions
        Rows of a step.
    candidates
        Of each row.
    """
    times = {k: round(v, 3) for k, v in overhead_ms(sessions, candidates).items()}
    print(json.dumps({"http_overhead_ms_p50": times["tcp"], **times}))


if __name__ == "__main__":
    app()
