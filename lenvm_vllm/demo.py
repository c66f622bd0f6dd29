"""`lenvm demo`: a value server and a `vllm serve` on loopback, and the same prompts in three arms.

unguided asks for the length in the prompt only; guided sets `length_target` without guard
rails; exact sets it with tolerance 0. Everything starts from this checkout's own environment.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenvm_vllm.machine import COMPILE_OFF, has_compiler
from lenvm_vllm.playground import PAGE
from lenvm_vllm.processes import VALUE_SERVER, VLLM_SERVE, free_port, left_by_signals, running
from value_server.contract.listen import check_port

ROOT = Path(__file__).parents[1]
LOGS = Path(sys.prefix)
MODEL = Path(sys.prefix) / "share" / "SmolLM2-135M-Instruct"
CHECKPOINT = ROOT / "checkpoints" / "smollm2-135m-instruct"
HOST = "127.0.0.1"
NAME = "SmolLM2-135M-Instruct"
# Where the value server would listen instead, so that nobody found it.
ELSEWHERE = ("LENVM_SERVER_UDS", "LENVM_SERVER_TLS_CERT", "LENVM_SERVER_TLS_KEY")
TARGETS = (50, 100, 200)
ARMS = ("unguided", "guided", "exact")
PROMPTS = (
    "Describe a walk through a forest in autumn.",
    "Explain how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper.",
    "What should one think of before adopting a dog?",
)
MAX_NUM_SEQS = 16


@dataclass(frozen=True, slots=True)
class Answer:
    arm: str
    target: int
    length: int
    text: str

    @property
    def deviation(self) -> float:
        """|L - N| / N in percent."""
        return 100 * abs(self.length - self.target) / self.target


@contextlib.contextmanager
def both_servers(port: int, value_port: int, playground: bool = False) -> Iterator[str]:
    """Base URL of a guided vLLM with its value server beside it."""
    value_url = f"http://{HOST}:{value_port}"
    url = f"http://{HOST}:{port}"
    value_server = [
        *VALUE_SERVER,
        *(str(CHECKPOINT), "--base-model", str(MODEL), "--threads", "1"),
        *("--host", HOST, "--port", str(value_port)),
    ]
    vllm = [
        *(*VLLM_SERVE, str(MODEL)),
        *("--served-model-name", NAME, "--host", HOST, "--port", str(port)),
        *("--max-model-len", "2048", "--max-num-seqs", str(MAX_NUM_SEQS)),
        *("--dtype", native_dtype()),
        *("--logits-processors", "lenvm_vllm"),
        "--enforce-eager",  # compiling takes longer than it saves here
    ]
    env = {"LENVM_URL": value_url, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    env["LENVM_PLAYGROUND"] = str(playground)
    if not has_compiler():
        env[COMPILE_OFF] = "1"  # else a request with logprobs would end the engine
    with (
        running(value_server, f"{value_url}/ready", LOGS / "value-server.log", env),
        running(vllm, f"{url}/health", LOGS / "vllm.log", env),
    ):
        yield url


def native_dtype() -> str:
    """bfloat16 where the device multiplies it natively; other CPUs emulate it, slowly."""
    import torch

    native = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


def ask(client: Any, arm: str, prompt: str, target: int) -> Answer:
    """One chat completion of one arm."""
    if arm == "unguided":
        prompt = f"{prompt} Your answer must be equal to {target} tokens."
        extra: dict[str, Any] = {}
    else:
        tolerance = None if arm == "guided" else 0.0
        extra = {"length_target": {"tokens": target, "tolerance": tolerance}}
    reply = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": prompt}],
        temperature=1.0,
        max_tokens=512,
        seed=1,
        extra_body={"top_k": 15, **extra},
    )
    return Answer(arm, target, reply.usage.completion_tokens, reply.choices[0].message.content)


def compare(url: str) -> list[Answer]:
    """All prompts, targets and arms, with a table that fills as answers come in."""
    from openai import OpenAI
    from rich.live import Live

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    jobs = [(arm, prompt, n) for arm in ARMS for n in TARGETS for prompt in PROMPTS]
    answers: list[Answer] = []
    pool = ThreadPoolExecutor(MAX_NUM_SEQS)
    try:
        with Live(_table(answers), refresh_per_second=2) as live:
            for answer in pool.map(lambda job: ask(client, *job), jobs):
                answers.append(answer)
                live.update(_table(answers))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # who leaves ends the servers, not these
    return answers


def _table(answers: list[Answer]) -> Any:
    from rich.table import Table

    table = Table("arm", "target", "length", "deviation", "text")
    for a in answers:
        start = " ".join(a.text.split())[:60]
        table.add_row(a.arm, str(a.target), str(a.length), f"{a.deviation:.0f}%", start)
    return table


def summary(answers: list[Answer]) -> dict[str, Any]:
    """Mean deviation of each arm in percent."""
    means = {}
    for arm in ARMS:
        deviations = [a.deviation for a in answers if a.arm == arm]
        means[f"{arm}_ld"] = round(sum(deviations) / len(deviations), 2)
    return {"targets": list(TARGETS), "prompts": len(PROMPTS), **means}


def demo(*, serve: bool = False, port: int | None = None, value_port: int | None = None) -> None:
    """Length control on the small real model; the last line is one JSON object.

    Parameters
    ----------
    serve
        Leave both servers up until interrupted, ask nothing.
    port
        Of vLLM; by default 8000 with --serve, else a free one.
    value_port
        Of the value server; by default 8100 with --serve, else a free one.
    """
    check_checkout()
    if port is None:
        port = 8000 if serve else free_port()
    if value_port is None:
        value_port = 8100 if serve else free_port()
    check_ports(port, value_port)
    for name in ELSEWHERE:
        os.environ.pop(name, None)
    with left_by_signals():
        print("starting the value server and vLLM (about a minute)", flush=True)
        try:
            answers = run(port, value_port, serve)
        except RuntimeError as error:  # a server that did not start, with the end of its log
            sys.exit(f"error: {error}")
    texts = Path(sys.prefix) / "demo.jsonl"
    with texts.open("w") as file:
        for a in answers:
            row = {"arm": a.arm, "target": a.target, "length": a.length, "text": a.text}
            file.write(json.dumps(row) + "\n")
    print(f"texts: {texts}")
    print(json.dumps(summary(answers)))


def run(port: int, value_port: int, serve: bool) -> list[Answer]:
    """The answers of all arms; with `serve` only a signal ends it."""
    with both_servers(port, value_port, playground=serve) as url:
        if not serve:
            return compare(url)
        servers = f"vLLM: {url}/v1   value server: http://{HOST}:{value_port}"
        print(f"playground: {url}{PAGE}   {servers}   Ctrl-C ends both", flush=True)
        while True:
            signal.pause()


def check_checkout() -> None:
    """Raises ValueError outside of one that is set up: the demo's models are not in the wheel."""
    for path in (CHECKPOINT, MODEL):
        if not path.is_dir():
            raise ValueError(
                f"demo: no {path}; it runs in a checkout of lenvm-vllm, by `make demo`, and not "
                "from the installed package"
            )


def check_ports(port: int, value_port: int) -> None:
    """Raises ValueError or OSError that names the one which the demo cannot have."""
    for name, number in (("port", port), ("value_port", value_port)):
        if not 0 < number < 65536:
            raise ValueError(f"{name}: {number}, must be from 1 to 65535")
        check_port(HOST, number)
    if port == value_port:
        raise ValueError(f"value_port: {value_port} is vLLM's port already")
