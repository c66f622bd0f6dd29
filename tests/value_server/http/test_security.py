"""What a value server keeps from those whom it does not concern."""

import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from lenvm_vllm.commands.cli import main
from lenvm_vllm.commands.processes import free_port
from lenvm_vllm.settings import Settings, load_settings
from lenvm_vllm.values.client import Refused, Unreachable, ValueClient
from tests.support.blocked import SECONDS
from tests.support.value_servers import Server, as_client, served, step, step_body
from value_server.contract import wire
from value_server.contract.listen import check_certificate
from value_server.http.metrics import Figures
from value_server.settings import ServerSettings

pytestmark = pytest.mark.e2e

SECRET = "the merger with Acme is off"


def test_clients_with_tokens_of_their_own(server: Server) -> None:
    """From a file; none reaches another's session, by whatever name, or takes its place."""
    tokens = (*server.tokens, server.tokens[0][:-1])
    first, second, stranger = (as_client(server.url, token) for token in tokens)
    with first, second, stranger:
        assert stranger.get(wire.MODEL_PATH).status_code == 401
        assert step(first, ("s", 0, [1, 2], [3])).held == [2]
        assert step(second, ("s", 2, [3], [4])).held == [0]
        assert second.delete(f"{wire.SESSIONS_PATH}/s").status_code == 404
        second.post(wire.STEP_PATH, content=step_body(closed=["s"])).raise_for_status()
        # It may have four at a time, and all of a message are in use.
        assert step(second, *((name, 0, [5], [6]) for name in "abcde")).held == [1, 1, 1, 1, 0]
        assert step(first, ("s", 2, [3], [4])).held == [3]
        assert step(second, ("a", 1, [6], [7]), ("e", 1, [6], [7])).held == [2, 0]


def test_tls_from_end_to_end(checkpoint: Path, tmp_path: Path) -> None:
    """The port of the metrics has it, too."""
    authority = trustme.CA()
    ca, cert, key, token = (tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem", "token"))
    authority.cert_pem.write_to_path(str(ca))
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(str(cert))
    issued.private_key_pem.write_to_path(str(key))
    token.write_text("secret\n")
    port = free_port()
    flags = ("--tls-cert", str(cert), "--tls-key", str(key), "--metrics-port", str(port))
    verify = ssl.create_default_context(cafile=str(ca))
    environment = {"LENVM_TOKEN_FILE": str(token)}
    with served(checkpoint, *flags, scheme="https", verify=verify, **environment) as (url, _):
        message = wire.decode_request(step_body(("a", 0, [1], [2])))
        settings = {"tls_ca": ca, "token_file": token, "timeout_s": SECONDS}
        known = load_settings({"lenvm": settings}).connection
        assert ValueClient(url, **known).step(message).held == [1]
        with pytest.raises(Refused, match="401"):
            ValueClient(url, **known | {"token": "wrong"}).step(message)
        with pytest.raises(Unreachable, match="certificate"):
            ValueClient(url, **known | {"tls_ca": None}).step(message)
        text = httpx.get(f"https://127.0.0.1:{port}/metrics", verify=verify, timeout=SECONDS).text
    assert "lenvm_sessions 1.0" in text


@pytest.mark.parametrize("flag", ["--tls-cert", "--tls-key"])
def test_half_of_tls_is_refused(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lenvm", "serve", "checkpoint", flag, "x"])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert "tls_cert and tls_key" in f"{ended.value} {told.out} {told.err}"


def test_a_certificate_that_does_not_load_is_named(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    named = f"^tls_cert {cert} and tls_key {key}: "
    with pytest.raises(OSError, match=f"{named}No such file"):
        check_certificate(cert, key)
    for file in (cert, key):
        file.write_text("rubbish")
    with pytest.raises(OSError, match=named):
        check_certificate(cert, key)


def test_metrics_on_the_port_of_the_server() -> None:
    with pytest.raises(ValueError, match="metrics_port: 8100, must be another than port"):
        ServerSettings(port=8100, metrics_port=8100)


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ServerSettings().tokens == []
    monkeypatch.setenv("LENVM_TOKEN", "hunter2")
    assert ServerSettings().tokens == ["hunter2"]
    assert Settings().connection["token"] == "hunter2"
    monkeypatch.setenv("LENVM_TOKEN", "hunter2\n")  # as of a secret that was made from a file
    assert ServerSettings().tokens == ["hunter2"]
    assert Settings().connection["token"] == "hunter2"
    for odd in ("hunter\x002", "h\u00fcnter"):
        with pytest.raises(ValueError, match="token_file: a character of it") as refused:
            _ = Settings(token=odd).connection
        assert odd not in str(refused.value)
    for made in (ServerSettings(token="\n"), ServerSettings(token="h\u00fcnter")):
        with pytest.raises(ValueError, match=r"^token"):  # one that anybody, or nobody, could send
            _ = made.tokens
    with pytest.raises(ValueError, match=r"^token: nothing but space"):
        _ = Settings(token=" ").connection
    empty = tmp_path / "empty"
    empty.write_text("\n")
    with pytest.raises(ValueError, match="token_file: no token in"):
        _ = ServerSettings(token_file=empty).tokens
    with pytest.raises(ValueError, match="token_file: no token in"):
        _ = Settings(token_file=empty).connection
    for where in ("missing", "."):
        named = rf"^token_file: '{tmp_path / where}': (No such file|Is a directory)"
        with pytest.raises(OSError, match=named):
            _ = ServerSettings(token_file=tmp_path / where).tokens
        with pytest.raises(OSError, match=named):
            _ = Settings(token_file=tmp_path / where).connection
    (several := tmp_path / "several").write_text("one\ntwo\n")
    assert ServerSettings(token_file=several).tokens == ["one", "two"]
    with pytest.raises(ValueError, match=r"token_file: .*several, must have one token"):
        _ = Settings(token_file=several).connection
    (binary := tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    for settings in (ServerSettings(token_file=binary), Settings(token_file=binary)):
        with pytest.raises(ValueError, match=rf"^token_file: '{binary}': no text in UTF-8"):
            _ = settings.tokens if isinstance(settings, ServerSettings) else settings.connection
    assert "hunter2" not in repr(Settings()) + repr(ServerSettings(token="hunter2"))


def test_no_prompt_and_no_token_in_log_and_metrics(server: Server, client: httpx.Client) -> None:
    ids = list(SECRET.encode())
    message = [{"role": "user", "content": SECRET}]
    bodies: list[Any] = [
        {"prompt": SECRET},
        {"messages": message},
        {"messages": message, "prompt": SECRET},
        {"messages": [{"role": SECRET}]},
        {"prompt": [SECRET]},
        {SECRET: 1},
        {"prompt": SECRET * 100},
    ]
    before = len(server.log.read_text())
    for body in bodies:
        for path in (wire.PREDICT_PATH, wire.VALUES_PATH):
            assert client.post(path, json=body).status_code in (200, 400, 422)
    assert step(client, ("a", 0, ids, [2])).held == [len(ids)]
    for rows in [("a", 0, [*ids, 999], [2])], [("b", 0, ids * 30, [2])]:
        client.post(wire.STEP_PATH, content=step_body(*rows))
    client.post(wire.STEP_PATH, content=SECRET.encode())
    client.get(f"/{SECRET}")
    client.delete(f"{wire.SESSIONS_PATH}/{SECRET}")
    log = server.log.read_text()
    assert log[before:].count("invalid_request") >= 10
    for text in (log, client.get("/metrics").text):
        assert "merger" not in text
        assert server.tokens[0] not in text
        assert str(ids)[1:-1] not in text


def test_metrics_on_a_port_of_their_own(server: Server, client: httpx.Client) -> None:
    """They need no token there, and nothing else is to be had."""
    assert step(client, ("a", 0, [1], [2])).held == [1]
    with as_client(server.url) as stranger:
        assert stranger.get("/metrics").status_code == 401
    with as_client(f"http://127.0.0.1:{server.metrics_port}") as stranger:
        for path in ("/metrics", wire.MODEL_PATH):
            assert "lenvm_step_seconds_count" in stranger.get(path).text
        assert stranger.post(wire.STEP_PATH, content=step_body(("b", 0, [1], [2]))).is_error


def test_a_busy_metrics_port_is_told_at_once(server: Server) -> None:
    address = f"127.0.0.1:{server.metrics_port}"
    figures = Figures({})
    with pytest.raises(OSError, match=f"metrics_port: {address}: Address already in use"):
        figures.listen("127.0.0.1", server.metrics_port, None, None)
