"""Two servers in a block that only a signal leaves: `python -m tests.support.ended DELAY`.

Each is a process with a child of its own that no SIGTERM ends, and answers after DELAY seconds.
"""

import signal
import sys
import tempfile
from pathlib import Path

from lenvm_vllm.commands.processes import Server, free_port, left_by_signals

SERVER = """
import http.server, subprocess, sys, time
subprocess.Popen(["sh", "-c", "trap '' TERM; while :; do sleep 1; done"])
time.sleep(float(sys.argv[2]))
http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind="127.0.0.1")
"""


def server(delay: str, log: Path) -> Server:
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port), delay]
    return Server(command, f"http://127.0.0.1:{port}", "/", log)


def main(delay: str) -> None:
    with tempfile.TemporaryDirectory() as folder, left_by_signals():
        print("starting", flush=True)
        log = Path(folder) / "log"
        with server(delay, log), server(delay, log):
            print("both", flush=True)
            while True:
                signal.pause()


if __name__ == "__main__":
    main(sys.argv[1])
