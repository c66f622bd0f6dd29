"""A real headless browser: the Chromium of this machine."""

import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


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
