"""A real headless browser, the Chromium of this machine, and a server for its pages."""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, expect, sync_playwright

from lenvm_vllm.commands.processes import free_port

NAMES = ("chromium", "chromium-browser", "google-chrome")
expect.set_options(timeout=60_000)  # milliseconds that a busy machine may need


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the test where there is none, but fails where REQUIRE_CHROMIUM is set."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        missing = "no chromium on this machine: apt-get install chromium"
        assert not os.environ.get("REQUIRE_CHROMIUM"), missing
        pytest.skip(missing)
    # As root Chromium runs without its sandbox only.
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The URL of an ASGI application."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
