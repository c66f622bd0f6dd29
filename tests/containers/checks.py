"""What has to hold of the running services; each check notes in the tally what does not."""

import time
from collections.abc import Callable

from tests.containers.clients import Client, Tally
from tests.containers.shell import say
from tests.containers.stack import Stack

TOKENS = 60
AT_A_TIME = 4
LONG = 160  # tokens of a request that a fault finds on its way
PATIENCE_S = 60
FOLDER = "~/.cache/huggingface/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct"


def requests(client: Client) -> None:
    """Each kind of request: what it asks for, and what a bare installation finds hard."""
    say("requests")
    client.length(TOKENS, 54, 66)
    client.length({"tokens": TOKENS, "tolerance": 0}, TOKENS, TOKENS)
    client.length({"mode": "at_most", "tokens": TOKENS}, 1, TOKENS)
    client.length(TOKENS, 54, 66, logprobs=True, top_logprobs=3)
    client.streamed(TOKENS, 54, 66)
    client.refused({"tokens": "many"}, "length_target.tokens")


def steered(stack: Stack, client: Client, tally: Tally) -> None:
    """Most of a request's tokens get values in time, if not at once."""
    for _ in range(10):
        before = stack.counters()
        client.length(TOKENS, 54, 66)
        gained = {name: value - before[name] for name, value in stack.counters().items()}
        if gained["valued_rows"] > gained["rows"] / 2:
            return
        time.sleep(2)
    tally.check(False, f"no values: {gained}")


def token(stack: Stack, tally: Tally, needed: bool) -> None:
    """The value server's doors, without a token: figures on a port of their own, nothing else."""
    say("token" if needed else "no token")
    for url, status in (
        ("http://values:8100/v1/model", 401 if needed else 200),
        ("http://values:8100/metrics", 401 if needed else 200),
        ("http://values:8101/metrics", 200),
    ):
        code = f"import httpx; print(httpx.get({url!r}).status_code)"
        seen = stack.inside("vllm-cpu", code)
        tally.check(seen == str(status), f"{url} without a token: {seen}, not {status}")


def downloaded(stack: Stack, tally: Tally) -> None:
    """The model came from the hub and lies in the volume, for both."""
    code = f"import glob, os; print(*glob.glob(os.path.expanduser('{FOLDER}/snapshots/*/*')))"
    files = stack.inside("vllm-cpu", code).split()
    weights = [file for file in files if file.endswith("/model.safetensors")]
    tally.check(len(weights) == 1, f"in the volume: {files}")
    asked = stack.compose("logs", "--no-color", "hub").count("model.safetensors")
    tally.check(asked > 0, "the hub was not asked for the weights")


def value_server_stops(stack: Stack, client: Client, tally: Tally) -> None:
    """Under load: requests end inside their rails, and steering comes back."""
    say("docker stop of the value server, under load")
    before = stack.counters()["fallback_steps"]
    with client.load(AT_A_TIME, LONG) as running:
        tally.check(not all(request.done() for request in running), "no load on the value server")
        stack.stop("values-cpu")
    client.length({"tokens": TOKENS, "tolerance": 0}, TOKENS, TOKENS)
    without = stack.counters()["fallback_steps"] - before
    tally.check(without > 0, "nothing went on without values")
    stack.up("values-cpu", **stack.chosen)
    steered(stack, client, tally)


def vllm_stops(stack: Stack, client: Client, tally: Tally) -> None:
    """Under load: what runs is answered."""
    say("docker stop of vLLM, under load")
    with client.load(AT_A_TIME, LONG) as running:
        tally.check(not all(request.done() for request in running), "no load on vLLM")
        stack.stop("vllm-cpu")


def wait_until(true: Callable[[], bool], patience: float = PATIENCE_S) -> bool:
    """Whether it became true."""
    deadline = time.monotonic() + patience
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(2)
    return True
