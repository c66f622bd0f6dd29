"""The playground in a browser, before a server that asks for its API key as vLLM does."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from lenvm_vllm.api.middleware import LengthTargetMiddleware
from tests.support.browser import chromium, served

KEY = "sesame"
MODELS = {"data": [{"id": "m", "max_model_len": 512}]}


async def models(scope: Any, receive: Any, send: Any) -> None:
    """Every path of /v1 is the list of models, for those who have the key."""
    may = dict(scope["headers"]).get(b"authorization") == f"Bearer {KEY}".encode()
    body = json.dumps(MODELS if may else {"error": "Unauthorized"}).encode()
    headers = [(b"content-type", b"application/json")]
    start = {"type": "http.response.start", "status": 200 if may else 401, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def test_the_key_is_asked_for_and_never_shown(browser, monkeypatch):
    monkeypatch.setenv("LENVM_PLAYGROUND", "true")
    with served(LengthTargetMiddleware(models)) as url:
        page = browser.new_page()
        page.goto(f"{url}/lenvm")
        expect(page.locator("#notice")).to_have_text("This server asks for its API key.")
        key = page.get_by_label("API key")
        key.fill("guess")
        key.press("Tab")
        expect(page.locator("#notice")).to_be_visible()
        key.fill(KEY)
        key.press("Enter")
        expect(page.locator("#notice")).to_be_hidden()
        expect(page.locator("#model")).to_have_value("m")
        page.get_by_label("Unit").select_option("tokens")
        expect(page.get_by_role("slider", name="Goal")).to_have_attribute("max", "256")
        expect(page.locator("#curl")).to_contain_text('-H "Authorization: Bearer $API_KEY"')
        expect(page.locator("#python")).to_contain_text('api_key=os.environ["API_KEY"]')
        assert KEY not in page.content()
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [
            *(0, 0, "")
        ]
        page.reload()
        expect(page.get_by_label("API key")).to_have_value("")
        page.close()


def test_a_server_that_is_gone(browser, monkeypatch):
    monkeypatch.setenv("LENVM_PLAYGROUND", "true")
    with served(LengthTargetMiddleware(models)) as url:
        page = browser.new_page()
        page.goto(f"{url}/lenvm")
        expect(page.locator("#notice")).to_be_visible()
        page.get_by_role("button", name="Compare").wait_for()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#guided .error")).to_contain_text("The server does not answer")
    expect(page.locator("#stop")).to_be_disabled()
    page.close()
