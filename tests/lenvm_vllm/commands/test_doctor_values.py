"""What `lenvm doctor` says of settings and value servers."""

import json
import re
import socket
import ssl
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme
from transformers import AutoConfig

from lenvm_vllm.commands import doctor
from lenvm_vllm.commands.doctor.finding import Finding
from lenvm_vllm.commands.processes import free_port
from tests.support.fakes import INFO
from tests.support.tiny import tiny_tokenizer
from tests.support.tiny_llm import tiny_llm
from value_server.contract import wire
from value_server.contract.weights import weights_fingerprint


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENVM_TOKEN", "secret")
    monkeypatch.setenv("LENVM_TIMEOUT_S", "30")


def found(model: str | None = None) -> dict[str, Finding]:
    """By part, each once."""
    findings = list(doctor.values.findings(model))
    assert len({finding.part for finding in findings}) == len(findings)
    return {finding.part: finding for finding in findings}


def told(url: str, patch: pytest.MonkeyPatch, **environment: str) -> tuple[str, str]:
    """(what is seen, what is advised) of the value server at `url`, which is ill."""
    patch.setenv("LENVM_URL", url)
    for name, value in environment.items():
        patch.setenv(name, value)
    finding = found()["value server"]
    assert finding.is_wrong
    assert finding.seen.startswith(f"{url}: ")
    return finding.seen.removeprefix(f"{url}: "), finding.advice


def test_values_for_the_tokens_of_another_model(
    values: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tiny_tokenizer(("<more>",)).save_pretrained(tmp_path / "other")
    monkeypatch.setenv("LENVM_URL", values.url())
    assert found(str(tmp_path / "model"))["tokenizer"].state == "ok"
    finding = found(other := str(tmp_path / "other"))["tokenizer"]
    assert finding.is_wrong
    assert finding.seen == (
        f"{values.url()}: its values are for the tokens of tiny, not for those of {other}"
    )
    assert f"`lenvm serve CHECKPOINT` with one that was trained for {other}" in finding.advice
    assert found(str(tmp_path))["tokenizer"].advice.startswith("name a model that has one")
    assert found()["tokenizer"].state == "off"


def test_values_learnt_with_other_weights(
    values: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As of a quantised copy: same name, shapes and tokens. It is told, and is no error."""
    monkeypatch.setenv("LENVM_URL", values.url())
    model, other = (str(tiny_llm(tmp_path / str(seed), seed)) for seed in (0, 1))
    assert "weights" not in found(model)  # the checkpoint does not say
    info = json.loads(values.answer[1]) | {"base_fingerprint": weights_fingerprint(model)}
    values.answer = (200, json.dumps(info).encode())
    assert found(model)["weights"].state == "ok"
    finding = found(other)["weights"]
    assert finding.state == "off"
    assert f"learnt with other weights than those of {other}" in finding.seen
    assert f"`lenvm evaluate` on rollouts of {other}" in finding.advice
    assert "pictures" not in found(model)  # it takes none
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer-only")
    assert "weights" not in found(str(tmp_path / "tokenizer-only"))


def test_whether_pictures_are_seen(
    values: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LENVM_URL", values.url())
    AutoConfig.for_model("llava").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    finding = found(str(tmp_path))["pictures"]
    assert (finding.state, "reads text alone" in finding.seen) == ("off", True)
    info = json.loads(values.answer[1]) | {"sees_pictures": True}
    values.answer = (200, json.dumps(info).encode())
    assert found(str(tmp_path))["pictures"].state == "ok"


def test_tokens(values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values.token = "secret"
    monkeypatch.delenv("LENVM_TOKEN")
    for given in ({}, {"LENVM_TOKEN": "other"}):
        seen, advice = told(values.url(), monkeypatch, **given)
        assert "HTTP 401" in seen
        assert advice == "set LENVM_TOKEN or LENVM_TOKEN_FILE to one of its tokens, for vLLM too"


# httpcore leaves a Unix socket that could not connect to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also while a server loads its model."""
    port = free_port()
    for slash in ("", "/"):
        seen, advice = told(f"http://127.0.0.1:{port}{slash}", monkeypatch)
        assert "refused" in seen
        assert advice.startswith(
            f"`lenvm serve CHECKPOINT --port {port}`, where CHECKPOINT is a folder"
        )
    assert "wait until its log says that it runs" in advice
    assert "set LENVM_URL" in advice
    _, advice = told(f"unix:{tmp_path}/socket", monkeypatch)
    assert advice.startswith(f"`lenvm serve CHECKPOINT --uds {tmp_path}/socket`")


def test_no_such_host(monkeypatch: pytest.MonkeyPatch) -> None:
    _, advice = told("http://nowhere.invalid:8100", monkeypatch)
    assert advice == "there is no such host: correct LENVM_URL"


def test_tls(values: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, advice = told(values.url("https"), monkeypatch)
    assert advice == "it has no TLS: set LENVM_URL to http://…"
    authority, ca = trustme.CA(), str(tmp_path / "ca.pem")
    authority.cert_pem.write_to_path(ca)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    values.socket = context.wrap_socket(values.socket, server_side=True)
    _, advice = told(values.url("https"), monkeypatch)
    assert advice.startswith("set LENVM_TLS_CA to the PEM file")
    _, advice = told(values.url(), monkeypatch)
    assert advice.startswith("it may want TLS: set LENVM_URL to https://…")
    monkeypatch.setenv("LENVM_URL", values.url("https"))
    monkeypatch.setenv("LENVM_TLS_CA", ca)
    assert found()["value server"].state == "ok"
    _, advice = told(values.url(), monkeypatch, LENVM_TLS_CA=str(tmp_path / "none"))
    assert advice == "correct LENVM_URL, or LENVM_TLS_CA, which names a PEM file"


def test_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        seen, advice = told(url, monkeypatch, LENVM_TIMEOUT_S="0.2")
    assert "no answer in time" in seen
    assert advice.startswith("it hangs, or a firewall is between: look into its log")


def test_a_server_that_ends(values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values.answer = (503, b"")
    _, advice = told(values.url(), monkeypatch)
    assert advice == "it is ending, or ill: look into its log, and start it anew"


def test_a_server_that_is_too_slow(values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.values, "_PATIENCE", 1e8)
    _, advice = told(values.url(), monkeypatch, LENVM_TIMEOUT_S="0.00001")
    assert re.match(r"set LENVM_TIMEOUT_S above \d+\.\d, or", advice)


def test_no_value_server(values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where LENVM_URL is vLLM's own address; and one of another version of ours."""
    url = values.url()
    for answer in ((404, b'{"detail":"Not Found"}'), (200, b"<html>")):
        values.answer = answer
        _, advice = told(url, monkeypatch)
        assert advice.startswith("something else listens there: set LENVM_URL to the value server")
    info = json.dumps(msgspec.to_builtins(INFO) | {"version": wire.WIRE_VERSION + 1}).encode()
    values.answer = (200, info)
    seen, advice = told(url, monkeypatch)
    assert f"the server speaks {wire.WIRE_VERSION + 1}, not {wire.WIRE_VERSION}" in seen
    assert advice == "install the same version of lenvm-vllm on both sides"


def test_a_model_that_the_server_does_not_have(
    values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = {"type": "unknown_model", "message": "no model 'b'; this server has …: a"}
    values.answer = (404, json.dumps({"error": error}).encode())
    seen, advice = told(f"{values.url()}/models/b", monkeypatch)
    assert "no model 'b'; this server has" in seen
    assert advice.startswith("name one that it has in LENVM_URL, http://host:port/models/NAME, or ")
    assert advice.endswith(f"`lenvm serve b=CHECKPOINT --port {values.server_port}`")
    monkeypatch.setenv("LENVM_URL", values.url())
    monkeypatch.setenv("LENVM_ADAPTERS", json.dumps({"sql": f"{values.url()}/models/b"}))
    *_, finding, _ = doctor.values.findings(None)
    assert finding.advice.startswith("name one that it has in LENVM_ADAPTERS, ")


@pytest.mark.parametrize(
    ("url", "command"),
    [
        ("http://models:8101", "lenvm serve CHECKPOINT --port 8101"),
        ("http://models/models/a", "lenvm serve a=CHECKPOINT"),
        ("unix:/srv/models/s", "lenvm serve CHECKPOINT --uds /srv/models/s"),
        ("unix:/srv/models/s:/models/org/a", "lenvm serve org/a=CHECKPOINT --uds /srv/models/s"),
    ],
)
def test_how_a_server_is_started(url: str, command: str) -> None:
    assert doctor.values._serve(url) == command


@pytest.mark.parametrize(
    ("name", "value", "seen"),
    [
        ("LENVM_TIMEOUT_S", "-1", "LENVM_TIMEOUT_S=-1: Input should be greater than 0"),
        ("LENVM_URL", "values:8100", "LENVM_URL=values:8100: Value error, expected http://host"),
        ("LENVM_ADAPTERS", "{sql", "LENVM_ADAPTERS={sql: Expecting property name"),
        ("LENVM_TOKEN_FILE", "/none", "token_file: '/none': No such file or directory"),
        ("LENVM_TOKEN_FILE", "/dev/null", "token_file: no token in /dev/null"),
    ],
)
def test_wrong_settings(name: str, value: str, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    (finding,) = doctor.values.findings(None)
    assert (finding.part, finding.is_wrong) == ("settings", True)
    assert seen in finding.seen
    assert f"correct {name}" in finding.advice


def test_a_variable_that_nobody_reads(values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENVM_URL", values.url())
    for name in ("LENVM_SERVER_PORT", "LENVM_METRICS_DIR", "LENVM_VALUES_SERVICE_HOST"):
        monkeypatch.setenv(name, "1")
    assert "settings" not in found()
    monkeypatch.setenv("LENVM_TIMEOUT", "1")
    finding = found()["settings"]
    assert finding.seen == "LENVM_TIMEOUT: no such variable is read"
    assert finding.advice == "call it LENVM_TIMEOUT_S"
