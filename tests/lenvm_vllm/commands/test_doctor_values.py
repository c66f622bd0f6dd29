"""What `lenvm doctor` says of settings and value servers: real servers, ill in real ways."""

import json
import signal
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import pytest
import trustme

from lenvm_vllm.commands.doctor import values
from lenvm_vllm.commands.doctor.finding import Finding
from lenvm_vllm.commands.processes import free_port
from tests.support.fakes import INFO
from tests.support.tiny import tiny_checkpoint, tiny_tokenizer
from tests.value_server.http.test_security import served

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("values")
    tiny_checkpoint(folder / "value")
    tiny_tokenizer().save_pretrained(folder / "model")
    tiny_tokenizer(("<more>",)).save_pretrained(folder / "other")
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with served(folder / "value", LENVM_TOKEN="secret") as (url, _):
        yield url


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENVM_TOKEN", "secret")


def found(model: str | None = None) -> dict[str, Finding]:
    """By part, each once."""
    findings = list(values.findings(model))
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
    folder: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENVM_URL", url)
    assert found(str(folder / "model"))["tokenizer"].state == "ok"
    finding = found(other := str(folder / "other"))["tokenizer"]
    assert finding.is_wrong
    assert finding.seen == (
        f"{url}: its values are for the tokens of tiny, not for those of {other}"
    )
    assert f"`lenvm serve CHECKPOINT` with one that was trained for {other}" in finding.advice
    assert found(str(folder))["tokenizer"].advice.startswith("name a model that has one")
    assert found()["tokenizer"].state == "off"


def test_tokens(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, advice = told(url, monkeypatch, LENVM_TOKEN="other")
    assert "HTTP 401" in seen
    assert (
        advice == "set LENVM_TOKEN or LENVM_TOKEN_FILE to one of the server's tokens, for vLLM too"
    )
    monkeypatch.delenv("LENVM_TOKEN")
    _, advice = told(url, monkeypatch)
    assert advice == "it asks for a token: set LENVM_TOKEN or LENVM_TOKEN_FILE, for vLLM too"


# httpcore leaves a Unix socket that could not connect to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also while a server loads its model."""
    port = free_port()
    seen, advice = told(f"http://127.0.0.1:{port}", monkeypatch)
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


def test_tls(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, advice = told(url.replace("http:", "https:"), monkeypatch)
    assert advice == "it has no TLS: set LENVM_URL to http://…"
    authority = trustme.CA()
    ca, cert, key = (tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem"))
    authority.cert_pem.write_to_path(str(ca))
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(str(cert))
    issued.private_key_pem.write_to_path(str(key))
    flags = ("--tls-cert", str(cert), "--tls-key", str(key))
    verify = ssl.create_default_context(cafile=str(ca))
    with served(folder / "value", *flags, scheme="https", verify=verify) as (secure, _):
        _, advice = told(secure, monkeypatch)
        assert advice.startswith("set LENVM_TLS_CA to the PEM file")
        _, advice = told(secure.replace("https:", "http:"), monkeypatch)
        assert advice.startswith("it may want TLS: set LENVM_URL to https://…")
        monkeypatch.setenv("LENVM_URL", secure)
        monkeypatch.setenv("LENVM_TLS_CA", str(ca))
        assert found()["value server"].state == "ok"
    _, advice = told(secure, monkeypatch, LENVM_TLS_CA=str(tmp_path / "none"))
    assert advice == "correct LENVM_URL, or LENVM_TLS_CA, which names a PEM file"


def test_a_server_that_hangs_or_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(folder / "value", "--drain-s", "60") as (url, process):
        process.send_signal(signal.SIGSTOP)
        seen, advice = told(url, monkeypatch, LENVM_TIMEOUT_S="0.2")
        process.send_signal(signal.SIGCONT)
        assert "no answer in time" in seen
        assert advice.startswith("it hangs, or a firewall is between: look into its log")
        monkeypatch.delenv("LENVM_TIMEOUT_S")
        process.send_signal(signal.SIGTERM)
        while "HTTP 503" not in (found()["value server"].seen):
            pass
        _, advice = told(url, monkeypatch)
        assert advice == "it is ending, or ill: look into its log, and start it anew"


def test_a_server_that_is_too_slow(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_PATIENCE", 1e6)
    _, advice = told(url, monkeypatch, LENVM_TIMEOUT_S="0.00001")
    assert advice.startswith("set LENVM_TIMEOUT_S above 0.")


class Another(BaseHTTPRequestHandler):
    """Something that answers with what the server holds."""

    def do_GET(self) -> None:
        status, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def another() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Another)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_no_value_server(another: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where LENVM_URL is vLLM's own address; and one of another version of ours."""
    url = f"http://127.0.0.1:{another.server_port}"
    for answer in ((404, b'{"detail":"Not Found"}'), (200, b"<html>")):
        another.answer = answer  # type: ignore[attr-defined]
        _, advice = told(url, monkeypatch)
        assert advice.startswith("something else listens there: set LENVM_URL to the value server")
    info = json.dumps(msgspec.to_builtins(INFO) | {"version": 2}).encode()
    another.answer = (200, info)  # type: ignore[attr-defined]
    seen, advice = told(url, monkeypatch)
    assert "the server speaks 2, not 1" in seen
    assert advice == "install the same version of lenvm-vllm on both sides"


@pytest.mark.parametrize(
    ("name", "value", "seen"),
    [
        ("LENVM_TIMEOUT_S", "-1", "LENVM_TIMEOUT_S=-1: Input should be greater than 0"),
        ("LENVM_URL", "values:8100", "LENVM_URL=values:8100: Value error, expected http://host"),
        ("LENVM_TOKEN_FILE", "/none", "No such file or directory: '/none'"),
    ],
)
def test_wrong_settings(name: str, value: str, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    (finding,) = values.findings(None)
    assert (finding.part, finding.is_wrong) == ("settings", True)
    assert seen in finding.seen
    assert f"correct {name}" in finding.advice


def test_a_variable_that_nobody_reads(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENVM_URL", url)
    for name in ("LENVM_SERVER_PORT", "LENVM_METRICS_DIR", "LENVM_VALUES_SERVICE_HOST"):
        monkeypatch.setenv(name, "1")
    assert "settings" not in found()
    monkeypatch.setenv("LENVM_TIMEOUT", "1")
    finding = found()["settings"]
    assert finding.seen == "LENVM_TIMEOUT: no such variable is read"
    assert finding.advice == "call it LENVM_TIMEOUT_S"
