"""Build the images, run the compose file's `cpu` profile, and check what it does.

    python -m tests.containers MODEL_FOLDER     (make containers)

Takes the container engine that answers; where none does, and this is a Debian and its root,
installs Debian's and runs one of its own, with stand-ins for the images of a registry out of
reach. Needs 12 GB for that, below TMPDIR (/var/tmp), and takes about ten minutes.

The last line is JSON: what was found, or {"skipped": why} where no engine can be had.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

from tests.containers import checks
from tests.containers.base import base_images
from tests.containers.clients import Client, Tally
from tests.containers.engine import NoEngineError, engine
from tests.containers.figures import figures
from tests.containers.shell import CommandError, say
from tests.containers.stack import SERVICES, Stack

TOKEN = "a-token-of-this-test"
LIMIT_GB = {"cpu": 2.8, "values": 1.5}
LONGEST_S = 25 * 60


def main() -> int:
    """0 for healthy or skipped, 1 for anything that is not as it should be."""
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGALRM, _end)
    signal.alarm(LONGEST_S)
    folder = Path(tempfile.mkdtemp(prefix="lenvm-", dir=os.environ.get("TMPDIR", "/var/tmp")))
    try:
        with engine(folder) as docker, base_images(docker, folder) as images:
            result = examine(Stack(docker, images, Path(sys.argv[1]).resolve()), folder)
    except NoEngineError as error:
        say(f"CONTAINERS NOT TESTED: {error}")
        result = {"skipped": str(error)}
    except CommandError as error:
        result = {"healthy": False, "wrong": [str(error)]}
    finally:
        signal.alarm(0)
        say("removing what was built")
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result), flush=True)
    return 0 if result.get("healthy") or "skipped" in result else 1


def examine(stack: Stack, folder: Path) -> dict[str, Any]:
    """Build, start, check, and leave nothing."""
    tally, sizes = Tally(), {}
    try:
        sizes = stack.build(folder / "build.log")
        for name, size in sizes.items():
            tally.check(size <= LIMIT_GB[name], f"the image {name} has {size} GB")
        run_checks(stack, tally)
    except (CommandError, ValueError, httpx.HTTPError) as error:
        tally.check(False, str(error) or repr(error))
    finally:
        if tally.wrong:
            say(stack.logs())
        stack.down()
    wrong = {"wrong": tally.wrong} if tally.wrong else {}
    return {
        "healthy": not tally.wrong,
        "requests": tally.requests,
        "failed": tally.failed,
        "image_gb": sizes,
    } | wrong


def run_checks(stack: Stack, tally: Tally) -> None:
    """With a token and a hub; then with neither, from what the volume holds."""
    client = Client(stack.vllm, tally)
    stack.up("hub")
    stack.up(*SERVICES, LENVM_TOKEN=TOKEN)
    checks.downloaded(stack, tally)
    checks.requests(client)
    checks.steered(stack, client, tally)
    checks.value_server_stops(stack, client, tally)
    checks.token(stack, tally, needed=True)
    figures(stack, tally)
    checks.vllm_stops(stack, client, tally)
    stack.stop("hub")
    stack.up(*SERVICES, LENVM_TOKEN="", HF_HUB_OFFLINE="1")
    checks.requests(client)
    checks.steered(stack, client, tally)
    checks.token(stack, tally, needed=False)


def _end(number: int, _frame: object) -> None:
    """By way of every `finally`."""
    signal.alarm(0)
    raise SystemExit(f"ended by {signal.Signals(number).name}")


if __name__ == "__main__":
    sys.exit(main())
