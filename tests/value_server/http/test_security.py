"""What a value server keeps from those whom it does not concern; a real process each time."""

import signal
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from lenvm_vllm.settings import Settings, load_settings
from lenvm_vllm.values.client import Refused, Unreachable, ValueClient
from tests.support.tiny import tiny_checkpoint
from tests.value_server.http.test_server import free_port, launch, step, step_body, wait_ready
from value_server.contract import wire
from value_server.settings import ServerSettings

pytestmark = pytest.mark.e2e

SECRET = "the merger with Acme is off"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@contextmanager
def served(
    checkpoint: Path, *flags: str, scheme: str = "http", verify: Any = True, **environment: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """URL and process of a server, interrupted at the end unless it has ended before."""
    port = free_port()
    command = (str(checkpoint), "--port", str(port), "--slots", "400", "--threads", "1", *flags)
    process = launch(*command, **environment)
    url = f"{scheme}://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, verify=verify, trust_env=False) as client:
            wait_ready(client, process)
        yield url, process
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


def as_client(url: str, token: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False)


def test_clients_with_tokens_of_their_own(checkpoint: Path, tmp_path: Path) -> None:
    """From a file; none reaches another's session, by whatever name, or takes its place."""
    tokens = tmp_path / "tokens"
    tokens.write_text("first\nsecond\n")
    flags = ("--token-file", str(tokens), "--client-sessions", "2")
    with (
        served(checkpoint, *flags) as (url, _),
        as_client(url, "first") as first,
        as_client(url, "second") as second,
        as_client(url, "firs") as stranger,
    ):
        assert stranger.get(wire.MODEL_PATH).status_code == 401
        assert step(first, ("s", 0, [1, 2], [3])).unknown == []
        assert step(second, ("s", 2, [3], [4])).unknown == [0]
        assert second.delete(f"{wire.SESSIONS_PATH}/s").status_code == 404
        second.post(wire.STEP_PATH, content=step_body(closed=["s"])).raise_for_status()
        for name in ("a", "b", "c", "d"):
            assert step(second, (name, 0, [5], [6])).unknown == []
        assert step(first, ("s", 2, [3], [4])).unknown == []
        assert step(second, ("a", 1, [6], [7]), ("d", 1, [6], [7])).unknown == [0]


def test_tls_from_end_to_end(checkpoint: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    ca, cert, key, token = (tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem", "token"))
    authority.cert_pem.write_to_path(str(ca))
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(str(cert))
    issued.private_key_pem.write_to_path(str(key))
    token.write_text("secret\n")
    flags = ("--tls-cert", str(cert), "--tls-key", str(key))
    verify = ssl.create_default_context(cafile=str(ca))
    with served(checkpoint, *flags, scheme="https", verify=verify, LENVM_TOKEN_FILE=str(token)) as (
        url,
        _,
    ):
        message = wire.decode_request(step_body(("a", 0, [1], [2])))
        known = load_settings({"lenvm": {"tls_ca": ca, "token_file": token}}).connection
        assert ValueClient(url, **known).step(message)[1] == []
        with pytest.raises(Refused, match="401"):
            ValueClient(url, **known | {"token": "wrong"}).step(message)
        with pytest.raises(Unreachable, match="certificate"):
            ValueClient(url, **known | {"tls_ca": None}).step(message)


@pytest.mark.parametrize("flags", [("--tls-cert", "x"), ("--tls-key", "x")])
def test_half_of_tls_is_refused(checkpoint: Path, flags: tuple[str, str]) -> None:
    process = launch(str(checkpoint), *flags)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "tls_cert and tls_key" in errors


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ServerSettings().tokens == []
    monkeypatch.setenv("LENVM_TOKEN", "hunter2")
    assert ServerSettings().tokens == ["hunter2"]
    assert Settings().connection["token"] == "hunter2"
    empty = tmp_path / "empty"
    empty.write_text("\n")
    with pytest.raises(ValueError, match="token_file: no token in"):
        _ = ServerSettings(token_file=empty).tokens
    with pytest.raises(OSError, match="missing"):
        _ = ServerSettings(token_file=tmp_path / "missing").tokens
    with pytest.raises(OSError, match="missing"):
        _ = Settings(token_file=tmp_path / "missing").connection
    assert "hunter2" not in repr(Settings()) + repr(ServerSettings(token="hunter2"))


def test_no_prompt_and_no_token_in_the_log(checkpoint: Path) -> None:
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
    port = free_port()
    process = launch(
        *(str(checkpoint), "--port", str(port), "--slots", "400"), LENVM_TOKEN="hunter2"
    )
    with as_client(f"http://127.0.0.1:{port}", "hunter2") as client:
        wait_ready(client, process)
        for body in bodies:
            for path in (wire.PREDICT_PATH, wire.VALUES_PATH):
                assert client.post(path, json=body).status_code in (200, 400, 422)
        assert step(client, ("a", 0, ids, [2])).unknown == []
        for rows in [("a", 0, [*ids, 999], [2])], [("b", 0, ids * 30, [2])]:
            client.post(wire.STEP_PATH, content=step_body(*rows))
        client.post(wire.STEP_PATH, content=SECRET.encode())
        client.get(f"/{SECRET}")
        client.delete(f"{wire.SESSIONS_PATH}/{SECRET}")
        metrics = client.get("/metrics").text
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=30)
    for text in (log, metrics):
        assert "merger" not in text
        assert "hunter2" not in text
        assert str(ids)[1:-1] not in text


def test_metrics_on_a_port_of_their_own(checkpoint: Path) -> None:
    """They need no token there, and nothing else is to be had; a busy port is told at once."""
    port = free_port()
    flags = ("--metrics-port", str(port))
    url = f"http://127.0.0.1:{port}"
    with served(checkpoint, *flags, LENVM_TOKEN="hunter2") as (server, _):
        assert httpx.get(f"{server}/metrics").status_code == 401
        with as_client(server, "hunter2") as client:
            assert step(client, ("a", 0, [1], [2])).unknown == []
        for path in ("/metrics", wire.MODEL_PATH):
            assert "lenvm_step_seconds_count 1.0" in httpx.get(url + path).text
        assert httpx.post(url + wire.STEP_PATH, content=step_body(("b", 0, [1], [2]))).is_error
        second = launch(str(checkpoint), "--port", str(free_port()), *flags)
        _, log = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"metrics_port: 127.0.0.1:{port}: Address already in use" in log


def test_metrics_port_is_encrypted_where_the_other_is(checkpoint: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "key.pem")
    files = ("--tls-cert", str(tmp_path / "key.pem"), "--tls-key", str(tmp_path / "key.pem"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    port = free_port()
    flags = (*files, "--metrics-port", str(port))
    with served(checkpoint, *flags, scheme="https", verify=context):
        text = httpx.get(f"https://127.0.0.1:{port}/metrics", verify=context).text
    assert "lenvm_sessions 0.0" in text
