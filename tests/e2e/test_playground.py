"""The playground in a real browser, in front of the real small model and its value model; and the
examples, on the same servers."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from lenvm_vllm.commands.demo import NAME, ROOT
from tests.e2e.pairs import Pair
from tests.support.browser import chromium
from value_server.contract.units import CHARACTERS, WORDS
from value_server.contract.units import count as count_of

pytestmark = [pytest.mark.e2e, pytest.mark.pair("small")]
SECONDS = 120  # of two answers on a busy machine
REST = "mark => mark.style.getPropertyValue('--expected')"
COLOUR = "mark => getComputedStyle(mark).backgroundColor"


@pytest.fixture
def url(pair: Pair) -> str:
    return pair.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page, loaded. Afterwards: it had no error, and asked nobody but its own server."""
    page = browser.new_page(viewport={"width": 1240, "height": 1000})
    errors: list[Any] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: errors.append(error))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{url}/lenvm")
    expect(page.locator("#model")).to_have_value(NAME)
    page.get_by_text("More").click()
    page.locator("#most").fill("80")  # the unguided answers go on for long
    yield page
    page.close()
    refused = "the server responded with a status of 400"
    assert [said for said in errors if refused not in str(said)] == []
    assert [other for other in asked if not other.startswith(f"{url}/")] == []


def compare(page: Page, **fields: str) -> None:
    """Fill in, ask, and wait for both answers."""
    for name, value in fields.items():
        page.locator(f"#{name}").fill(value)
    ask(page, lambda: page.get_by_role("button", name="Compare").click())


def ask(page: Page, begin: Callable[[], None]) -> None:
    """Begin, and wait for the end of both answers."""
    with page.expect_response("**/v1/chat/completions", timeout=1000 * SECONDS):
        begin()
    expect(page.locator("#stop")).to_be_disabled(timeout=1000 * SECONDS)


def count(page: Page, panel: str) -> int:
    return int(page.locator(f"#{panel} .count").inner_text())


def text(page: Page, panel: str) -> str:
    return page.locator(f"#{panel} .text").text_content() or ""


def choose(page: Page, mode: str) -> None:
    page.locator(".modes label", has_text=mode).click()


def test_prompt_dial_two_streams_counts(page: Page, tmp_path: Path) -> None:
    page.locator("#most").fill("250")
    page.locator("#temperature").fill("0.5")
    page.get_by_text("More").click()
    page.locator("#prompt").fill("Explain how a bicycle stays upright.")
    page.get_by_label("Unit").select_option(WORDS)
    dial = page.get_by_role("slider", name="Goal")
    dial.focus()
    dial.press("Home")
    for _ in range(17):
        dial.press("ArrowRight")
    expect(page.locator("#goal")).to_have_value("100")
    expect(page.locator("#bounds")).to_contain_text("from 90 to 110 words; brought about from 95")
    page.get_by_role("button", name="Compare").click()
    guided, unguided = page.locator("#guided"), page.locator("#unguided")
    # They come side by side, and the bar tells of the rest.
    expect(guided.locator(".text span").nth(8)).to_be_attached(timeout=1000 * SECONDS)
    spoken = guided.locator(".bar").get_attribute("aria-valuetext") or ""
    assert re.search(r"\d+ words, \d+ expected still", spoken)
    expect(page.locator("#stop")).to_be_enabled()
    expect(unguided.locator(".text span").nth(8)).to_be_attached()
    expect(page.locator("#stop")).to_be_disabled(timeout=1000 * SECONDS)

    for panel in ("guided", "unguided"):
        assert count(page, panel) == count_of(text(page, panel), WORDS)
    assert 90 <= count(page, "guided") <= 110
    assert len(text(page, "unguided")) > 100
    expect(guided.locator(".badge")).to_have_text(re.compile("natural|whole|cut"))
    expect(guided.locator(".account")).to_contain_text("steps steered · 1 ending")
    expect(guided.locator(".time")).to_have_text(re.compile(r"^\d+\.\d s$"))
    spans, known = guided.locator(".text span"), guided.locator(".text .known")
    assert spans.count() > 8  # what waits for a busy API server comes together
    assert known.count() >= spans.count() - 1
    assert unguided.locator(".text .known").count() == 0
    # Colours go with what is expected: the most, and the least.
    expected = [float(known.nth(i).evaluate(REST)) for i in range(known.count())]
    highest, lowest = (known.nth(expected.index(e)) for e in (max(expected), min(expected)))
    assert highest.evaluate(COLOUR) != lowest.evaluate(COLOUR)

    spans.nth(5).hover()
    expect(guided.locator(".token")).to_contain_text(
        re.compile(r"^Token \d+ .* · \d words so far · \d+\.\d expected behind it")
    )
    points = page.locator("#chart .expected").get_attribute("points") or ""
    assert len(points.split()) >= known.count() + 1
    assert page.locator("#chart .rail").count() == 2
    assert page.locator("#chart .landing, #chart .here, #chart .end, #chart .aim").count() == 4
    expect(page.locator("#said")).to_contain_text(f"Guided: {count(page, 'guided')} words")
    expect(page.locator("#python")).to_contain_text('{"length_target": {"words": 100}}')
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_a_limit_in_characters_is_never_passed(page: Page) -> None:
    choose(page, "at most")
    page.get_by_label("Unit").select_option(CHARACTERS)
    page.evaluate(
        """() => {
            window.seen = [];
            const count = document.querySelector("#guided .count");
            const see = () => window.seen.push(Number(count.textContent));
            new MutationObserver(see).observe(count, { childList: true });
        }"""
    )
    compare(page, goal="155")
    seen = page.evaluate("window.seen")
    assert len(seen) > 1
    assert max(seen) == count(page, "guided") == len(text(page, "guided")) <= 155
    assert count(page, "unguided") == len(text(page, "unguided"))
    expect(page.locator("#guided .goal")).to_have_text("of at most 155 characters")
    expect(page.locator("#curl")).to_contain_text('"characters": 155')


def test_keyboard_alone(page: Page) -> None:
    page.get_by_label("Unit").focus()
    page.keyboard.type("tok")
    page.locator("#prompt").fill("Say hello.")
    page.locator("#goal").fill("20")
    ask(page, lambda: page.locator("#prompt").press("Control+Enter"))
    text = page.locator("#guided .text")
    text.focus()
    expect(page.locator("#guided .token")).to_contain_text("Token 1 ")
    text.press("ArrowRight")
    expect(page.locator("#guided .token")).to_contain_text("Token 2 ")
    page.get_by_role("radio", name="equal to").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="at most")).to_be_checked()
    expect(page.locator("#tolerance")).to_be_hidden()
    expect(page.locator("#python")).to_contain_text('{"mode": "at_most", "tokens": 20}')


def test_other_modes(page: Page) -> None:
    choose(page, "range")
    compare(page, shortest="20", longest="30")
    assert 20 <= count(page, "guided") <= 30
    page.get_by_label("Unit").select_option("tokens")
    choose(page, "at most")
    compare(page, goal="15")
    assert count(page, "guided") <= 15
    choose(page, "tilt")
    expect(page.get_by_role("slider", name="Beta")).to_be_visible()
    compare(page, beta="-30")
    assert page.locator("#guided .text .known").count() > 0
    expect(page.locator("#curl")).to_contain_text('"beta": -30')


def test_other_endings_come_whole(page: Page) -> None:
    page.get_by_label("Other endings").check()
    page.get_by_label("The prompt says the length").check()
    compare(page, goal="30")
    assert 27 <= count(page, "guided") <= 33
    expect(page.locator("#guided .account")).to_contain_text("tokens sampled")
    assert count(page, "guided") == count_of(text(page, "guided"), WORDS)
    expect(page.locator("#curl")).to_contain_text("must have exactly 30 words.")


def test_errors_are_the_words_of_the_400(page: Page) -> None:
    choose(page, "range")
    compare(page, shortest="300", longest="200")
    words = "length_target.min_words: 300 is above max_words 200"
    expect(page.locator("#bounds")).to_have_text(words)
    expect(page.locator("#guided .error")).to_have_text(words)


def test_copied_requests_run(page: Page) -> None:
    page.locator("#prompt").fill("Say \"hello\" in it's own way: 'ä' \\ $HOME.")
    page.get_by_label("Unit").select_option("tokens")
    page.locator("#goal").fill("24")
    page.locator("#tolerance").select_option("0")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    copied = {}
    for kind in ("curl", "python"):
        page.get_by_role("button", name=f"Copy {kind}").click()
        copied[kind] = page.evaluate("navigator.clipboard.readText()")
        assert copied[kind] == page.locator(f"#{kind}").inner_text()
    code = f"{copied['python']}\nprint(reply.usage.completion_tokens)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "24"
    curl = ["bash", "-c", copied["curl"]]
    told = json.loads(subprocess.run(curl, capture_output=True, text=True, check=True).stdout)
    assert told["usage"]["completion_tokens"] == 24
    assert "$HOME" in copied["curl"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_small_screens(browser: Browser, url: str, scheme: Any) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 720}, color_scheme=scheme)
    page.goto(f"{url}/lenvm")
    page.get_by_label("Unit").select_option(CHARACTERS)  # the longest name
    for mode in ("equal to", "at most", "at least", "range", "tilt"):
        choose(page, mode)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.locator("#wish").evaluate("form => form.scrollWidth <= form.clientWidth")
        dials = page.locator(".dials").evaluate("box => [box.scrollWidth, box.clientWidth]")
        assert dials[0] <= dials[1]
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == (scheme == "dark")
    page.close()


def test_example_with_a_progress_bar(url: str) -> None:
    example = ROOT / "examples" / "stream_with_progress.py"
    command = [sys.executable, str(example), "--url", f"{url}/v1", "--tokens", "40"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tokens expected" in run.stdout
    (tokens,) = re.findall(r"^(\d+) tokens, (?:natural|whole|cut) end$", run.stdout, re.MULTILINE)
    assert 36 <= int(tokens) <= 44
    assert f"{tokens} of {tokens} tokens" in run.stdout
