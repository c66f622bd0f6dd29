"""The settings of the plugin, the value servers that they name, and what their values are for."""

import difflib
import os
import time
from collections.abc import Iterator
from typing import Any

import httpx
from pydantic import ValidationError

from lenvm_vllm.commands.doctor.finding import Finding, one_line
from lenvm_vllm.settings import Settings, load_settings
from lenvm_vllm.telemetry.metrics import FOLDER
from lenvm_vllm.values.client import (
    BadReply,
    Mismatch,
    Refused,
    TimedOut,
    Unreachable,
    ValueClient,
    ValueServerError,
)
from value_server.contract import wire

_PATIENCE = 8  # times as long as the plugin, to tell a slow server from none


def findings(model: str | None) -> Iterator[Finding]:
    """Settings, each server, and whether its values are for the tokens of `model`."""
    yield from _misspelt()
    try:
        settings = load_settings()
        connection = settings.connection
    except (ValueError, OSError) as error:
        yield from _settings(error)
        return
    served = {}
    for url in settings.url:
        finding, info = _server(url, settings, connection)
        yield finding
        if info is not None:
            served[url] = info
    if model is None:
        text, advice = "not compared with vLLM's", "`lenvm doctor --model MODEL`, as vLLM serves it"
        yield Finding("tokenizer", text, advice, off=True)
    elif served:
        yield from _tokenizer(model, served)


def _misspelt() -> Iterator[Finding]:
    """Variables that nobody reads, and that look like one that is read."""
    known = [f"LENVM_{name}".upper() for name in Settings.model_fields]
    for name in sorted(os.environ):
        if not name.startswith("LENVM_") or name.startswith("LENVM_SERVER_"):
            continue
        near = difflib.get_close_matches(name, known, 1, 0.85)
        if name != FOLDER and name not in known and near:
            yield Finding("settings", f"{name}: no such variable is read", f"call it {near[0]}")


def _settings(error: Exception) -> Iterator[Finding]:
    if not isinstance(error, ValidationError):  # a file that one of them names
        advice = "correct LENVM_TOKEN_FILE, which names it"
        yield Finding("settings", one_line(error), advice)
        return
    for each in error.errors():
        name = f"LENVM_{each['loc'][0]}".upper()
        given = os.environ.get(name, each["input"])
        text = f"{name}={given}: {each['msg']}"
        yield Finding("settings", text, f"correct {name}, or unset it for the default")


def _server(
    url: str, settings: Settings, connection: dict[str, Any]
) -> tuple[Finding, wire.ModelInfo | None]:
    """Asks for one step, as the plugin does; None where its values cannot be had."""
    part = "value server"
    patient = connection | {"timeout_s": _PATIENCE * settings.timeout_s}
    try:
        client = ValueClient(url, **patient)
    except (httpx.InvalidURL, OSError) as error:
        advice = "correct LENVM_URL, or LENVM_TLS_CA, which names a PEM file"
        return Finding(part, f"{url}: {one_line(error)}", advice), None
    try:
        info = client.model(lambda: None)
        begin = time.perf_counter()
        client.step(_STEP)
        seconds = time.perf_counter() - begin
        client.step(_CLOSE)
    except ValueServerError as error:
        return Finding(part, f"{url}: {one_line(error)}", _advice(error, url, settings)), None
    finally:
        client.close()
    text = f"{url}: a step takes {1000 * seconds:.0f} ms, {_facts(info)}"
    slow = f"set LENVM_TIMEOUT_S above {seconds:.1f}, or give the server more room"
    return Finding(part, text, slow if seconds > settings.timeout_s else ""), info


def _request(tokens: int, **more: Any) -> wire.StepRequest:
    """A session of that many tokens, 0 or 1, with one candidate; none for 0."""
    packed, each = wire.pack_ids([1] * tokens), [1] * tokens
    fields = {"token_counts": each, "tokens": packed, "candidates": packed} | more
    return wire.StepRequest(starts=[0] * tokens, candidate_counts=each, **fields)


_STEP = _request(1, sessions=["doctor"])
_CLOSE = _request(0, sessions=[], closed=["doctor"])


def _advice(error: ValueServerError, url: str, settings: Settings) -> str:
    if isinstance(error, TimedOut):
        return "it hangs, or a firewall is between: look into its log, and start it anew"
    if isinstance(error, Mismatch):
        return "install the same version of lenvm-vllm on both sides"
    if isinstance(error, Refused):
        return _refused(error.status, settings)
    if isinstance(error, Unreachable):
        return _unreachable(str(error), url)
    assert isinstance(error, BadReply)
    return _NO_VALUE_SERVER


_NO_VALUE_SERVER = (
    "something else listens there: set LENVM_URL to the value server's address, not to vLLM's"
)


def _refused(status: int, settings: Settings) -> str:
    given = settings.token or settings.token_file
    if status == 401 and given:
        return "set LENVM_TOKEN or LENVM_TOKEN_FILE to one of the server's tokens, for vLLM too"
    if status == 401:
        return "it asks for a token: set LENVM_TOKEN or LENVM_TOKEN_FILE, for vLLM too"
    if status >= 500:
        return "it is ending, or ill: look into its log, and start it anew"
    return _NO_VALUE_SERVER


def _unreachable(text: str, url: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "set LENVM_TLS_CA to the PEM file of the authority that signed its certificate"
    if "SSL" in text:
        return "it has no TLS: set LENVM_URL to http://…"
    if "disconnected" in text or "reset" in text:
        return "it may want TLS: set LENVM_URL to https://…; if not, look into its log"
    if "ame or service" in text or "name resolution" in text or "nodename" in text:
        return "there is no such host: correct LENVM_URL"
    return (
        f"`{_serve(url)}`, where CHECKPOINT is a folder that `lenvm train` wrote, and wait until "
        "its log says that it runs; if it runs elsewhere, set LENVM_URL"
    )


def _serve(url: str) -> str:
    if url.startswith("unix:"):
        return f"lenvm serve CHECKPOINT --uds {url.removeprefix('unix:')}"
    port = httpx.URL(url).port
    return "lenvm serve CHECKPOINT" + (f" --port {port}" if port not in (None, 8100) else "")


def _tokenizer(model: str, served: dict[str, wire.ModelInfo]) -> Iterator[Finding]:
    try:
        from transformers import AutoTokenizer

        from value_server.contract.checkpoint import tokenizer_fingerprint  # loads torch

        ours = tokenizer_fingerprint(AutoTokenizer.from_pretrained(model))
    except Exception as error:  # transformers and the hub have many
        advice = "name a model that has one, a folder or a hub name"
        yield Finding("tokenizer", f"of {model}: {one_line(error)}", advice)
        return
    for url, info in served.items():
        if info.tokenizer_fingerprint == ours:
            yield Finding("tokenizer", f"{url}: its values are for the tokenizer of {model}")
            continue
        text = (
            f"{url}: its values are for the tokens of {info.base_model}, not for those of {model}"
        )
        advice = (
            f"`lenvm serve CHECKPOINT` with one that was trained for {model}; "
            "docs/training.md tells how it is made"
        )
        yield Finding("tokenizer", text, advice)


def _facts(info: wire.ModelInfo) -> str:
    return f"gamma {info.gamma:g}, {info.base_model}, at most {info.max_position} tokens"
