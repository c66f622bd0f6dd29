"""What a final line says of its making; above all what it must not say."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import provenance
from benchmarks.provenance import KEY, end
from lenvm_vllm.commands import processes
from lenvm_vllm.commands.processes import Server

ROOT = Path(__file__).parents[2]


def server(tmp_path: Path) -> Server:
    command = ["/usr/bin/python3", "-m", "x", "serve", str(tmp_path / "model"), "--seed", "3"]
    env = {"LENVM_URL": "http://127.0.0.1:1", "LENVM_TOKEN": "secret", "HOME": "/root"}
    return Server(command, "http://127.0.0.1:1", "/", tmp_path / "log", env)


def test_the_final_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(provenance, "STARTED", [server(tmp_path)])
    monkeypatch.setenv("LENVM_WAIT_SHARE", "3")
    monkeypatch.setenv("LENVM_TOKEN_FILE", "/run/token")
    monkeypatch.setenv("LENVM_SERVER_TOKENS", "secret")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    end({"figure": 1}, "a table")
    table, line = capsys.readouterr().out.splitlines()
    assert table == "a table"
    told = json.loads(line)
    assert told["figure"] == 1
    made = told[KEY]
    assert made["commit"] is None or len(made["commit"].rstrip("+")) == 40
    assert {"python", "torch", "transformers"} <= made["versions"].keys()
    assert made["machine"]["cores"] >= 1
    assert made["machine"]["processor"]
    assert made["settings"]["LENVM_WAIT_SHARE"] == "3"
    assert made["servers"] == [
        {
            "command": "python3 -m x serve model --seed 3",
            "settings": {"LENVM_URL": "http://127.0.0.1:1"},
        }
    ]
    assert "secret" not in line
    assert str(tmp_path) not in line
    end({"figure": 1})  # a run without a table
    assert capsys.readouterr().out.count("\n") == 1


def test_what_a_run_began_with_is_told() -> None:
    """Not what the checkout is at its end, nor the cores that it kept to."""
    run = """if True:
        import os, sys
        from types import SimpleNamespace
        from benchmarks import provenance
        sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 0))
        provenance._git = lambda *_: "another"
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        told = provenance.provenance()
        assert told["commit"] != "another+", told
        assert told["machine"]["cores"] == len(cores), told
    """
    subprocess.run([sys.executable, "-c", run], check=True, cwd=ROOT)


def test_servers_of_this_process_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STARTED", [])
    ill = server(tmp_path)
    ill.command = ["/bin/false"]
    for _ in range(2):  # started again it is the same one
        with pytest.raises(RuntimeError):
            ill.start()
    assert [ill] == processes.STARTED


@pytest.mark.parametrize("folder", ["systems", "evidence"])
def test_every_command_ends_by_it(folder: str) -> None:
    """A command is a file with an `app`; its last line is made here and nowhere else."""
    for path in sorted((ROOT / "benchmarks" / folder).glob("*.py")):
        tree = ast.parse(path.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        if "app" not in names or path.name in ("ablations.py", "scaling.py", "censoring.py"):
            continue  # these three end by grid.py
        assert "end" in names, path.name
