"""The settings of the plugin, the value servers that they name, and what their values are for."""

import difflib
import os
import time
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_settings import SettingsError

from lenvm_vllm.commands.doctor.finding import Finding, guarded, one_line
from lenvm_vllm.host.media import placeholder_ids
from lenvm_vllm.settings import Settings, load_settings
from lenvm_vllm.telemetry.metrics import FOLDER
from lenvm_vllm.values.client import ValueClient
from lenvm_vllm.values.endpoint import parts
from value_server.contract import wire

_PATIENCE = 8  # times as long as the plugin, to tell a slow server from none
_NO_VALUES = (
    "something else listens there: set LENVM_URL to the value server's address, not to vLLM's"
)
_LOST = {
    "^TimedOut": "it hangs, or a firewall is between: look into its log, and start it anew",
    "^Mismatch": "install the same version of lenvm-vllm on both sides",
    "unknown_model": "name one that it has in LENVM_URL, http://host:port/models/NAME, or "
    "`{serve}`",
    "HTTP 401": "set LENVM_TOKEN or LENVM_TOKEN_FILE to one of its tokens, for vLLM too",
    "HTTP 5": "it is ending, or ill: look into its log, and start it anew",
    "^Refused|^BadReply": _NO_VALUES,
    "CERTIFICATE_VERIFY_FAILED": "set LENVM_TLS_CA to the PEM file of its certificate's authority",
    "^Unreachable.*SSL": "it has no TLS: set LENVM_URL to http://…",
    "disconnected|reset": "it may want TLS: set LENVM_URL to https://…; if not, look into its log",
    "ame or service|name resolution|nodename": "there is no such host: correct LENVM_URL",
    "^Unreachable": "`{serve}`, where CHECKPOINT is a folder that `lenvm train` wrote, and wait "
    "until its log says that it runs; if it runs elsewhere, set LENVM_URL",
    "": "correct LENVM_URL, or LENVM_TLS_CA, which names a PEM file",
}


def findings(model: str | None) -> Iterator[Finding]:
    """Settings, each server, and whether its values are for the tokens of `model`."""
    yield from _misspelt()
    try:
        settings = load_settings()
        connection = settings.connection
    except (ValueError, OSError) as error:
        yield from _settings(error)
        return
    served: dict[str, wire.ModelInfo] = {}
    for url in settings.servers:
        variable = "LENVM_URL" if url in settings.url else "LENVM_ADAPTERS"
        remedies = {
            error: advice.format(serve=_serve(url)).replace("LENVM_URL", variable)
            for error, advice in _LOST.items()
        }
        look = _server(url, settings.timeout_s, connection, served)
        yield from guarded("value server", url, look, remedies)
    if model is None:
        text, advice = "not compared with vLLM's", "`lenvm doctor --model MODEL`, as vLLM serves it"
        yield Finding("tokenizer", text, advice, off=True)
    elif served:
        remedies = {"": "name a model that has one, a folder or a hub name"}
        yield from guarded("tokenizer", f"of {model}", _tokenizer(model, served), remedies)
        yield from guarded("weights", f"of {model}", _weights(model, served), remedies)
        yield from guarded("pictures", f"of {model}", _pictures(model, served), remedies)


def _misspelt() -> Iterator[Finding]:
    """Variables that nobody reads, and that look like one that is read."""
    known = [FOLDER, *(f"LENVM_{name}".upper() for name in Settings.model_fields)]
    for name in sorted(os.environ):
        if not name.startswith("LENVM_") or name.startswith("LENVM_SERVER_"):
            continue
        near = difflib.get_close_matches(name, known, 1, 0.85)
        if near and near != [name]:
            yield Finding("settings", f"{name}: no such variable is read", f"call it {near[0]}")


def _settings(error: Exception) -> Iterator[Finding]:
    if isinstance(error, SettingsError):  # it names the field, not the variable
        name = next((n for n in Settings.model_fields if f'"{n}"' in str(error)), "")
        name = f"LENVM_{name}".upper()
        text = f"{name}={os.environ.get(name, '')}: {one_line(error.__cause__ or error)}"
        yield Finding("settings", text, f"correct {name}, which is JSON")
        return
    if not isinstance(error, ValidationError):  # a token, or the file that one of them names
        advice = "correct LENVM_TOKEN_FILE, or LENVM_TOKEN"
        yield Finding("settings", one_line(error), advice)
        return
    for each in error.errors():
        name = f"LENVM_{each['loc'][0]}".upper()
        text = f"{name}={os.environ.get(name, each['input'])}: {each['msg']}"
        yield Finding("settings", text, f"correct {name}, or unset it for the default")


def _server(
    url: str, timeout_s: float, connection: dict[str, Any], served: dict[str, wire.ModelInfo]
) -> Iterator[Finding]:
    """Asks for one step, as the plugin does. served: gets what the server says of itself."""
    client = ValueClient(url, **connection | {"timeout_s": _PATIENCE * timeout_s})
    try:
        info = client.model(lambda: None)
        begin = time.perf_counter()
        client.step(_request(1, sessions=["doctor"]))
        seconds = time.perf_counter() - begin
        client.step(_request(0, sessions=[], closed=["doctor"]))
    finally:
        client.close()
    served[url] = info
    facts = f"gamma {info.gamma:g}, {info.base_model}, at most {info.max_position} tokens"
    slow = f"set LENVM_TIMEOUT_S above {seconds:.1f}, or give the server more room"
    text = f"{url}: a step takes {1000 * seconds:.0f} ms, {facts}"
    yield Finding("value server", text, slow if seconds > timeout_s else "")


def _request(tokens: int, **more: Any) -> wire.StepRequest:
    """A session of that many tokens, 0 or 1, with one candidate; none for 0."""
    packed, each = wire.pack_ids([1] * tokens), [1] * tokens
    fields = {"token_counts": each, "tokens": packed, "candidates": packed} | more
    return wire.StepRequest(starts=[0] * tokens, candidate_counts=each, **fields)


def _serve(url: str) -> str:
    socket, base = parts(url)
    place, named, name = base.rstrip("/").partition("://")[2].partition(wire.model_path(""))
    serve = f"lenvm serve {name}=CHECKPOINT" if named else "lenvm serve CHECKPOINT"
    if socket:
        return f"{serve} --uds {socket}"
    port = place.rpartition(":")[2]
    return serve + (f" --port {port}" if port.isdigit() and port != "8100" else "")


def _tokenizer(model: str, served: dict[str, wire.ModelInfo]) -> Iterator[Finding]:
    from transformers import AutoTokenizer

    from value_server.contract.checkpoint import tokenizer_fingerprint  # loads torch

    ours = tokenizer_fingerprint(AutoTokenizer.from_pretrained(model))
    for url, info in served.items():
        if info.tokenizer_fingerprint == ours:
            yield Finding("tokenizer", f"{url}: its values are for the tokenizer of {model}")
            continue
        text = f"its values are for the tokens of {info.base_model}, not for those of {model}"
        advice = (
            f"`lenvm serve CHECKPOINT` with one that was trained for {model}; "
            "docs/training.md tells how it is made"
        )
        yield Finding("tokenizer", f"{url}: {text}", advice)


def _weights(model: str, served: dict[str, wire.ModelInfo]) -> Iterator[Finding]:
    """A copy of the model that was quantised, or trained on, writes texts of other lengths."""
    from value_server.contract.weights import are_other_weights, weights_fingerprint

    ours = weights_fingerprint(model)
    for url, info in served.items():
        if are_other_weights(info.base_fingerprint, ours):
            text = (
                f"{url}: its values were learnt with other weights than those of {model}, as a "
                "quantised or a fine-tuned copy has"
            )
            advice = (
                f"`lenvm evaluate` on rollouts of {model} tells how good they are for it; "
                "docs/training.md tells how others are made"
            )
            yield Finding("weights", text, advice, off=True)
        elif ours and ours == info.base_fingerprint:
            yield Finding("weights", f"{url}: its values were learnt with those of {model}")


def _pictures(model: str, served: dict[str, wire.ModelInfo]) -> Iterator[Finding]:
    """Whether values are for requests with pictures, too, of a model that takes some."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError):  # a tokenizer alone
        return
    if not placeholder_ids(config):
        return
    for url, info in served.items():
        if info.sees_pictures:
            yield Finding("pictures", f"{url}: its value model sees them")
            continue
        text = f"{url}: its value model reads text alone; requests with pictures have no values"
        advice = "docs/training.md tells how one is made that sees them"
        yield Finding("pictures", text, advice, off=True)
