"""The first start of our commands: what they cannot do they say at once, in one line."""

import http.server
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lenvm_vllm.commands.demo import check_ports
from lenvm_vllm.commands.processes import free_port
from tests.support.tiny import tiny_checkpoint
from value_server.contract.listen import check_port, check_socket

ROOT = Path(__file__).parents[3]
AT_ONCE_S = 180  # with the imports of a busy machine; waiting for ever takes longer


def lenvm(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lenvm_vllm.commands.cli", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=AT_ONCE_S,
        check=False,
    )


class Healthy(http.server.BaseHTTPRequestHandler):
    """Somebody else's server, which answers all that ours is asked."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def busy() -> Iterator[int]:
    """A port that another server has, on all addresses."""
    with http.server.ThreadingHTTPServer(("", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize("command", ["demo", "demo --serve"])
@pytest.mark.parametrize("flag", ["--port", "--value-port"])
def test_demo_on_a_busy_port(command: str, flag: str, busy: int) -> None:
    ended = lenvm(*command.split(), flag, str(busy))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"error: port {busy} of 127.0.0.1: Address already in use\n"


@pytest.mark.e2e
def test_value_server_on_a_busy_port(busy: int, tmp_path: Path) -> None:
    """Before it looks at its checkpoint."""
    ended = lenvm("serve", str(tmp_path / "none"), LENVM_SERVER_PORT=str(busy))
    assert ended.returncode == 1
    assert ended.stderr == f"error: port {busy} of 127.0.0.1: Address already in use\n"


@pytest.mark.e2e
def test_value_server_whose_metrics_port_is_busy(busy: int, tmp_path: Path) -> None:
    ended = lenvm("serve", str(tmp_path / "none"), "--port", "0", "--metrics-port", str(busy))
    assert ended.returncode == 1
    assert ended.stderr == f"error: metrics_port {busy} of 127.0.0.1: Address already in use\n"


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_is_busy_on_every_address(host: str, busy: int) -> None:
    with pytest.raises(OSError, match=f"^port {busy} of {host}: Address already in use$"):
        check_port(host, busy)


@pytest.mark.e2e
def test_value_server_on_a_socket_that_is_in_use(tmp_path: Path) -> None:
    """It would take it from the other, whom nobody could reach any more; one left over is free."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        ended = lenvm("serve", str(tmp_path / "none"), "--uds", str(path))
    assert ended.returncode == 1
    assert ended.stderr == f"error: socket {path}: a server listens there\n"
    check_socket(path)


def test_sockets_that_nobody_can_have(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    for path, why in (
        (tmp_path / "none" / "s", "No such file or directory"),
        (tmp_path / ("s" * 120), "AF_UNIX path too long"),
        (file, "Address already in use"),
    ):
        with pytest.raises(OSError, match=f"^socket {path}: {why}$"):
            check_socket(path)
    check_socket(tmp_path / "s")
    assert [*tmp_path.iterdir()] == [file]
    assert file.read_text() == "precious"


def test_ports_that_nobody_can_have() -> None:
    for port in (-1, 0, 65536):
        with pytest.raises(ValueError, match=f"value_port: {port}, must be from 1 to 65535"):
            check_ports(free_port(), port)
    port = free_port()
    with pytest.raises(ValueError, match=f"value_port: {port} is vLLM's port already"):
        check_ports(port, port)
    with pytest.raises(OSError, match=r"^host 'nobody\.invalid': "):
        check_port("nobody.invalid", port)


@pytest.mark.e2e
def test_a_value_server_that_is_ended_while_it_loads(tmp_path: Path) -> None:
    checkpoint, port = tiny_checkpoint(tmp_path / "checkpoint"), free_port()
    for number in (signal.SIGINT, signal.SIGTERM):
        command = [sys.executable, "-c", LOADS_FOR_EVER, "serve", str(checkpoint)]
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=AT_ONCE_S)
        assert (process.returncode, errors) == (128 + number, b"")


LOADS_FOR_EVER = """
import time
import value_server.serve
from lenvm_vllm.commands.cli import main

def load(*_):
    print("loading", flush=True)
    time.sleep(1000)

value_server.serve.build_app = load
main()
"""


def test_setup_mends_an_environment_that_is_half_made(tmp_path: Path) -> None:
    """It was interrupted between Python and pip."""
    python, maker = tmp_path / "bin" / "python", tmp_path / "python3"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\ncase "$*" in "-m pip"*) test -e "$0-pip";; esac\n')
    maker.write_text('#!/bin/sh\ntouch "$3/bin/python-pip"\n')
    for program in (python, maker):
        program.chmod(0o755)
    ended = subprocess.run(
        ["bash", str(ROOT / "scripts" / "setup.sh")],
        env=os.environ | {"VENV": str(tmp_path), "PYTHON": str(maker)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"setup: virtual environment in {tmp_path}\n")


def ready_made(folder: Path, script: str) -> dict[str, str]:
    """Environment of a set-up whose virtual environment is there, with this for its Python."""
    for name, text in (("python", script), ("nvidia-smi", "echo GPU 0; sleep 0.2; echo GPU 1")):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    return os.environ | {"VENV": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}"}


def test_setup_tells_of_an_old_python_before_it_installs(tmp_path: Path) -> None:
    old = 'case "$*" in -c*) exit 1;; --version) echo Python 3.10.12;; *install*) exit 3;; esac'
    ended = subprocess.run(
        ["bash", str(ROOT / "scripts" / "setup.sh")],
        env=ready_made(tmp_path, old),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    told = f"Python 3.10.12 is too old: remove {tmp_path}, then PYTHON=python3.11\n"
    assert ended.stderr.endswith(told)


def test_setup_sees_every_gpu(tmp_path: Path) -> None:
    """Of several, each told as it is found: nobody may hang up behind the first."""
    ended = subprocess.run(
        ["bash", str(ROOT / "scripts" / "setup.sh")],
        env=ready_made(tmp_path, "true"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "vLLM for this machine's GPU" in ended.stdout


def test_a_small_model_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was begun would be taken for done."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    small_model = importlib.import_module("small_model")
    out = tmp_path / "share" / "model"
    out.mkdir(parents=True)

    def convert(_file: Path, folder: Path, _ends: list[str]) -> None:
        folder.mkdir()
        (folder / "model.safetensors").touch()
        (folder / "tokenizer.json").write_text(next(content))

    content = iter(())
    monkeypatch.setattr(small_model, "convert", convert)
    monkeypatch.setattr(small_model, "download", lambda folder: folder / "file")
    monkeypatch.setattr(sys, "argv", ["small_model.py", str(out)])
    with pytest.raises(StopIteration):
        small_model.main()
    assert not (out / "model.safetensors").exists()
    content = iter(["{}"])
    small_model.main()
    assert (out / "tokenizer.json").exists()
    assert [*out.parent.iterdir()] == [out]


@pytest.mark.parametrize("fails", [False, True])
def test_setup_tells_its_stages_and_keeps_the_noise(fails: bool, tmp_path: Path) -> None:
    """With a Python that installs nothing."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    refusal = 'case "$*" in *server*) echo "ERROR: no such package"; exit 3;; esac'
    python.write_text(f'#!/bin/sh\necho "noise: $*"\n{refusal if fails else ""}\n')
    python.chmod(0o755)
    ended = subprocess.run(
        ["bash", str(ROOT / "scripts" / "setup.sh")],
        env=os.environ | {"VENV": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "noise: -m pip install" in (tmp_path / "setup.log").read_text()
    stages = ended.stdout.splitlines()
    assert all(stage.startswith("setup: ") for stage in stages)
    if fails:
        assert ended.returncode == 3
        assert ended.stderr.startswith(f"setup: that failed; the end of {tmp_path}/setup.log:\n")
        assert ended.stderr.endswith("ERROR: no such package\n")
    else:
        assert (ended.returncode, ended.stderr) == (0, "")
        assert stages[-1] == f"setup: done; the log is {tmp_path}/setup.log"
