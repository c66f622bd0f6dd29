"""`lenvm doctor` as a user runs it, and what it prints into a pipe."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.servers import WAITS

ROOT = Path(__file__).parents[2]
DOCTOR = (sys.executable, "-m", "lenvm_vllm.commands.cli", "doctor")


def look(*flags: str, **environment: str) -> tuple[int, str]:
    """(exit code, what is printed)."""
    run = subprocess.run(
        [*DOCTOR, *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | WAITS | {"HF_HUB_OFFLINE": "1", "LENVM_TOKEN": "secret"} | environment,
        check=False,
    )
    assert "Traceback" not in run.stderr
    return run.returncode, run.stdout


def rows(text: str) -> list[tuple[str, str, str]]:
    """(state, part, what was found and what to do) of each row of a table in a pipe."""
    lines = text.replace("\n" + " " * 22, " ").splitlines()
    return [(line[:7].strip(), line[7:22].strip(), line[22:]) for line in lines[1:]]
