"""What `lenvm doctor` sees, of this environment and of a real value server."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lenvm_vllm.processes import free_port
from tests.test_security import served
from tests.tiny import tiny_checkpoint
from tests.tiny_llm import tiny_llm

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    tiny_checkpoint(folder / "value")
    tiny_llm(folder / "model")
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with served(folder / "value", LENVM_TOKEN="secret") as (url, _):
        yield url


def look(*flags: str, **environment: str) -> tuple[int, str]:
    """(exit code, what is printed)."""
    run = subprocess.run(
        [sys.executable, "-m", "lenvm_vllm.cli", "doctor", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "LENVM_TOKEN": "secret"} | environment,
        check=False,
    )
    return run.returncode, run.stdout


def test_all_is_well(folder: Path, url: str) -> None:
    code, text = look("--model", str(folder / "model"), LENVM_URL=url)
    assert code == 0, text
    for seen in ("vllm", "torch", "registered as lenvm", "names are there", "model runner V1"):
        assert seen in text
    assert f"{url}: answers in" in text
    assert f"its values are for the tokenizer of {folder / 'model'}" in text
    assert "wrong" not in text


def test_what_is_wrong_and_what_to_do(folder: Path, url: str) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    (folder / "empty").mkdir()
    code, text = look(
        *("--model", str(folder / "empty"), "--vllm", nobody),
        LENVM_URL=f"{url},{nobody}",
        LENVM_TOKEN="other",
        VLLM_PLUGINS="none",
    )
    assert code == 1
    for seen in ("leaves it out", "set LENVM_TOKEN", "start it (lenvm serve", "start vLLM there"):
        assert seen in text
    assert "vLLM cannot serve it" in text


def test_wrong_settings_are_named() -> None:
    code, text = look(LENVM_TIMEOUT_S="-1")
    assert code == 1
    assert "timeout_s" in text
