"""Commands with a time limit, and a line on stderr for each thing that is begun."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN = time.monotonic()


class CommandError(RuntimeError):
    """A command that failed or ran out of time; the message has the end of its output."""


def say(text: str) -> None:
    """A line on stderr, after the seconds since the start."""
    print(f"[{time.monotonic() - BEGIN:5.0f} s] {text}", file=sys.stderr, flush=True)


def run(
    *command: str | Path,
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
    text: str | None = None,
    output: Path | None = None,
    cwd: Path = ROOT,
) -> str:
    """The standard output. Raises CommandError.

    env: on top of this process's; text: standard input; output: a log for all that is said.
    """
    words = [str(word) for word in command]
    log = output.open("ab") if output else None
    try:
        done = subprocess.run(
            words,
            stdout=log or subprocess.PIPE,
            stderr=log or subprocess.PIPE,
            input=(text or "").encode(),
            env=os.environ | dict(env or {}),
            cwd=cwd,
            timeout=timeout,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CommandError(f"{' '.join(words)[:200]}: {error}") from error
    finally:
        if log:
            log.close()
    said = output.read_bytes() if output else (done.stderr or b"")
    if done.returncode:
        end = said.decode(errors="replace")[-4000:]
        raise CommandError(f"{' '.join(words)[:200]}: exit {done.returncode}\n{end}")
    return (done.stdout or b"").decode(errors="replace")


def works(
    *command: str | Path,
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
    text: str | None = None,
) -> bool:
    """Whether the command is there and succeeds."""
    try:
        run(*command, timeout=timeout, env=env, text=text)
    except CommandError:
        return False
    return True
