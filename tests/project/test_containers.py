"""The parts of the container test (tests/containers) that need no container."""

import json
import os
import subprocess
import sys
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
from huggingface_hub import snapshot_download

from tests.containers.base import pip_settings
from tests.containers.hub import Hub
from tests.containers.shell import ROOT
from tests.support.tiny import tiny_checkpoint


def test_stand_in_takes_along_how_pip_finds_packages() -> None:
    """But nothing that only this machine has; the environment wins, as in pip itself."""
    listed = """:env:.index-url='https://index.example/simple'
global.index-url='https://other.example/simple'
global.extra-index-url='file:///here/simple https://more.example/simple'
global.find-links='/here/wheels'
global.cert='/here/ca.pem'"""
    settings = pip_settings(listed, "http://172.17.0.1:1234/")
    assert settings.splitlines() == [
        "[global]",
        "index-url = https://index.example/simple",
        "extra-index-url = https://more.example/simple",
        "trusted-host = 172.17.0.1",
        "find-links = http://172.17.0.1:1234/",
        "cert = /etc/ssl/certs/ca-certificates.crt",
        "retries = 2",
        "timeout = 120",
    ]


def test_hub_of_the_container_test_is_one_for_its_client(tmp_path: Path) -> None:
    """huggingface_hub downloads a model from it, file by file and in ranges."""
    folder = tiny_checkpoint(tmp_path / "model")
    facts = {"name": "some/model", "folder": folder, "log_message": lambda *_: None}
    handler = type("Handler", (Hub,), facts)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        got = snapshot_download("some/model", endpoint=endpoint, cache_dir=tmp_path / "cache")
        part = httpx.get(
            f"{endpoint}/some/model/resolve/main/config.json",
            headers={"Range": "bytes=2-5"},
            timeout=60,
        )
        server.shutdown()
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in Path(got).iterdir()} == names
    for name in names:
        assert (Path(got) / name).read_bytes() == (folder / name).read_bytes()
    assert (part.status_code, part.content) == (206, (folder / "config.json").read_bytes()[2:6])


def test_without_an_engine_it_says_so(tmp_path: Path) -> None:
    """No docker on the PATH, and nobody who could install one: skipped, loudly, and no error."""
    code = "import os, tests.containers.__main__ as m; os.geteuid = lambda: 1000; exit(m.main())"
    run = subprocess.run(
        [sys.executable, "-c", code, "model"],
        cwd=ROOT,
        env=os.environ | {"PATH": str(tmp_path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0
    assert list(json.loads(run.stdout)) == ["skipped"]
    assert "CONTAINERS NOT TESTED: no container engine answers" in run.stderr
    assert list(tmp_path.iterdir()) == []
