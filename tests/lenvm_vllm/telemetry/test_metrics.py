"""What the engine counts, and its way to vLLM's `/metrics`."""

import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.sample.logits_processor import BatchUpdate

from lenvm_vllm.api.middleware import LengthTargetMiddleware
from lenvm_vllm.engine.processor import LenvmLogitsProcessor
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.telemetry import metrics
from lenvm_vllm.telemetry.metrics import FOLDER, Counters, exposition, share_folder
from lenvm_vllm.text.parts import Markers
from lenvm_vllm.values.client import TimedOut
from tests.support.fakes import EOS, Server, V, config, free, params, replicas_of
from tests.support.through import send_through
from tests.support.v2_slots import Runner

MARK = 9


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


def shown() -> dict[str, float]:
    lines = re.findall(r"^lenvm_(\w+)_total (\S+)$", exposition().decode(), re.MULTILINE)
    return {name: float(value) for name, value in lines}


def test_processes_are_added_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(shown().values()) == {0.0}
    for pid in (1, 2):
        monkeypatch.setattr(metrics.os, "getpid", lambda pid=pid: pid)
        counters = Counters()
        counters.add("requests")
        counters.add("value_seconds", 0.25)
    (folder / "3").write_bytes(b"half")  # one that is being made
    assert shown() == dict.fromkeys(metrics.HELP, 0.0) | {"requests": 2, "value_seconds": 0.5}


def test_without_a_folder_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    Counters().add("requests")
    assert exposition() == b""


@pytest.mark.parametrize("name", ["gone", "file"])
def test_a_folder_that_is_none_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Neither the engine, which would end, nor vLLM's own metrics."""
    (tmp_path / "file").touch()
    monkeypatch.setenv(FOLDER, str(tmp_path / name))
    Counters().add("requests")
    assert set(shown().values()) == {0.0}


def test_a_full_disk_is_met_at_the_start(folder: Path) -> None:
    """Not in a step of the engine, which would be ended by SIGBUS: no page is made later."""
    Counters()
    (path,) = folder.iterdir()
    assert path.stat().st_blocks * 512 >= path.stat().st_size > 0


def test_vllm_starts_where_no_folder_can_be_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("WARNING", "vllm.lenvm"):
        share_folder()
    assert FOLDER not in os.environ
    assert "nothing told of lengths" in caplog.text


def test_one_folder_for_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "")
    monkeypatch.delenv(FOLDER)
    share_folder()
    folder = metrics.os.environ[FOLDER]
    share_folder()
    assert metrics.os.environ[FOLDER] == folder
    assert Path(folder).is_dir()
    metrics.shutil.rmtree(folder)


def test_middleware_appends_to_what_vllm_shows(folder: Path) -> None:
    async def vllm(scope: Any, receive: Any, send: Any) -> None:
        assert dict(scope["headers"]) == {b"host": b"x"}  # no other format, no compression
        headers = [(b"content-type", b"text/plain"), (b"Content-Length", b"7")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"vllm 1\n"})

    headers = [(b"host", b"x"), (b"Accept", b"application/openmetrics-text")]
    headers += [(b"accept-encoding", b"gzip")]
    middleware = LengthTargetMiddleware(vllm)
    _, got, body = send_through(middleware, path="/metrics", method="GET", headers=headers)
    assert got == {b"content-type": b"text/plain"}
    assert body == b"vllm 1\n" + exposition()


@pytest.mark.parametrize(
    ("target", "output", "outcome"),
    [
        ({"tokens": 4}, [1, 2, EOS], (3, 4)),
        ({"tokens": 4}, [1, 2, EOS, -1], (3, 4)),  # vLLM was a step ahead
        ({"tokens": 4}, [1, 2, 3, 4], None),  # cut, or the client left
        ({"tokens": 4}, [], None),
        ({"mode": "at_most", "tokens": 4}, [1, EOS], (2, 2)),
        ({"mode": "at_most", "tokens": 1}, [1, EOS], (2, 1)),
        ({"mode": "at_least", "tokens": 4}, [1, EOS], (2, 4)),
        ({"mode": "at_least", "tokens": 1}, [1, EOS], (2, 2)),
        ({"mode": "range", "min_tokens": 3, "max_tokens": 4}, [1, EOS], (2, 3)),
        ({"mode": "range", "min_tokens": 1, "max_tokens": 4}, [1, EOS], (2, 2)),
        ({"mode": "tilt", "beta": 1.0}, [1, EOS], None),
        ({"tokens": 4, "scope": "answer"}, [1, MARK, 2, EOS], (2, 4)),
        ({"tokens": 4, "scope": "answer"}, [1, EOS], None),
        ({"tokens": 4, "scope": "thinking"}, [1, MARK, 2, 3], (2, 4)),
        ({"tokens": 4, "scope": "thinking"}, [1, EOS], None),
    ],
)
def test_outcome(target: Any, output: list[int], outcome: Any) -> None:
    wanted = LengthTarget.parse(target)
    assert RequestState(wanted, [7], output, [EOS], Markers(think_end=(MARK,))).outcome() == outcome


@pytest.mark.usefixtures("folder")
def test_v1_counts() -> None:
    server = Server()
    served = LenvmLogitsProcessor(config(), torch.device("cpu"), False, client=replicas_of(server))
    outputs: list[list[int]] = [[], [], []]
    wishes = [params(free(4)), params(free(4)), params()]
    served.update_state(
        BatchUpdate(3, [], [(i, p, [7], outputs[i]) for i, p in enumerate(wishes)], [])
    )
    served.apply(torch.zeros(3, V))
    server.error = TimedOut("slow")
    served.apply(torch.zeros(3, V))
    outputs[0] += [5, EOS]
    outputs[1] += [5, 6]
    served.update_state(BatchUpdate(0, [0, 1, 2], [], []))
    seen = shown()
    assert 0 < seen.pop("value_seconds") <= seen.pop("plan_seconds")
    assert {name: value for name, value in seen.items() if value} == {
        "requests": 2,
        "steps": 2,
        "fallback_steps": 1,
        "rows": 4,
        "valued_rows": 2,
        "finished": 1,
        "deviation_tokens": 2,
        "deviation_ratio": 0.5,
    }


@pytest.mark.usefixtures("folder")
def test_v2_counts_when_a_slot_goes_to_another() -> None:
    runner = Runner(Server())
    runner.add(0, params(free(4)))
    runner.step(0)
    runner.append(0, 5)
    runner.step(0)
    runner.append(0, EOS)  # no step follows it
    runner.add(1, params(free(4)))  # never gets to a step
    for slot in (0, 1):
        runner.add(slot, params())
    assert {name: shown()[name] for name in ("requests", "finished", "deviation_tokens")} == {
        "requests": 2,
        "finished": 1,
        "deviation_tokens": 2,
    }
