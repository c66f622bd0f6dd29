"""The playground's units in a browser, before a server that writes the prompt as its answer: what
the page counts is what Python counts."""

import json
import unicodedata
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from lenvm_vllm.api.playground import Playground
from tests.support.browser import chromium, served
from value_server.contract.units import PRIOR, count

MODELS = {"data": [{"id": "m", "max_model_len": 2048}]}
PROGRESS = {"tokens": 9, "expected": 20.0, "p_end": None}
IN_WORDS = {"words": 7, "expected_words": 15.5}
RESULT = {"tokens": 12, "words": 41, "characters": 250, "end": "whole", "forced": False}
RESULT |= {"steps": None, "endings": 1, "sampled_tokens": 12, "predicted_tokens": None}
LAST_LETTER = 0x323AF  # of Unicode
TEXTS = {
    "English": "# It's a **well-known** fact:\n\n* 1,000 bikes -- all\n* `a = b`  (100%)\n\n- - -",
    "Chinese": "自行车为什么不倒？因为（陀螺效应）：3个原因，“GPS”和HTML5。\n一、速度……",  # noqa: RUF001
    "Japanese": "それは、ジャイロスコープのコーヒー効果です。ｶﾀｶﾅｰも、々も「word」も。",
    "Thai": "จักรยานทรงตัวได้อย่างไร เพราะล้อหมุน ๑๒๓ รอบ",
    "Arabic": "كيف تبقى الدراجةُ مستقيمة؟ لأنَّ العجلاتِ تدور، ١٢٣ مرة.",
    "Korean": "자전거는 왜 넘어지지 않을까요? 바퀴가 돌기 때문입니다.",
    "emoji": "Hi 👩\u200d👩\u200d👧\u200d👦 family👍🏽! 🇩🇪🇫🇷 -- 😀a 𝒳𝟜 𠮷野家 e\u0301",  # noqa: RUF001
    "white space": "a\u00a0b\u3000c\u2028d\ufeffe\u200bf\x1cg\x85h",
}


def events(prompt: str, target: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A stream that answers with its prompt, two code points a token."""
    progress = PROGRESS | (IN_WORDS if target and "words" in target else {})
    parts = [prompt[i : i + 2] for i in range(0, len(prompt), 2)]
    for tokens, part in enumerate(parts, 1):
        told: dict[str, Any] = {"length_progress": progress} if target else {}
        choice = {"delta": {"content": part}, "finish_reason": None}
        yield {"choices": [choice | told], "usage": {"completion_tokens": tokens}}
    told = {"length_result": RESULT} if target else {}
    choice = {"delta": {}, "finish_reason": "stop"}
    yield {"choices": [choice | told], "usage": {"completion_tokens": len(parts) + 1}}


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"].startswith("/lenvm"):
        await Playground()(scope, scope["path"], send)
        return
    kind, body = b"application/json", json.dumps(MODELS).encode()
    if scope["method"] == "POST":
        message = {"more_body": True}
        data = b""
        while message.get("more_body"):
            message = await receive()
            data += message["body"]
        request = json.loads(data)
        told = events(request["messages"][0]["content"], request.get("length_target"))
        kind = b"text/event-stream"
        # As of a vLLM with --sse-keep-alive-interval.
        body = "".join(f": keep-alive\n\ndata: {json.dumps(event)}\n\n" for event in told).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with chromium() as browser, served(app) as url:
        page = opened(browser, url)
        yield page
        page.close()


def opened(browser: Browser, url: str) -> Page:
    page = browser.new_page()
    page.goto(f"{url}/lenvm")
    expect(page.locator("#model")).to_have_value("m")
    return page


def compare(page: Page, prompt: str) -> None:
    page.locator("#prompt").fill(prompt)
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#stop")).to_be_disabled()


@pytest.mark.parametrize("unit", ["words", "characters"])
@pytest.mark.parametrize("language", TEXTS)
def test_the_page_counts_as_python_does(page: Page, unit: str, language: str) -> None:
    page.get_by_label("Unit").select_option(unit)
    compare(page, TEXTS[language])
    assert page.locator("#unguided .text").text_content() == TEXTS[language]
    assert page.locator("#unguided .count").inner_text() == str(count(TEXTS[language], unit))


def test_every_character_is_of_the_same_kind(page: Page) -> None:
    """Before and behind a letter, and behind an ideograph: that tells the four kinds apart. Not
    those that Python's version of Unicode does not know."""
    counted = page.evaluate(
        """async most => {
            const { unitOf } = await import("/lenvm/units.js");
            const count = text => unitOf("words").counter()(text);
            const counts = c => `${count(c + "a")}${count("a" + c)}${count("一" + c)}`;
            return Array.from({ length: most }, (_, c) => counts(String.fromCodePoint(c))).join("");
        }""",
        LAST_LETTER + 1,
    )
    for i in range(LAST_LETTER + 1):
        if unicodedata.category(c := chr(i)) not in ("Cn", "Cs", "Co"):
            told = "".join(str(count(text, "words")) for text in (c + "a", "a" + c, "一" + c))
            assert counted[3 * i : 3 * i + 3] == told, hex(i)


def test_the_servers_own_numbers_win(page: Page) -> None:
    page.get_by_label("Unit").select_option("words")
    compare(page, "one two three")
    guided = page.locator("#guided")
    expect(guided.locator(".count")).to_have_text("41")
    expect(page.locator("#said")).to_contain_text("Guided: 41 words. whole")
    expect(page.locator("#said")).to_contain_text("Unguided: 3 words. its own end")
    guided.locator(".text span").first.hover()
    told = 'Token 9 "on" · 7 words so far · 15.5 expected behind it · no end allowed here'
    expect(guided.locator(".token")).to_have_text(told)
    spoken = page.locator("#chart").get_attribute("aria-label") or ""
    assert spoken == "Expected length: 23 words at first, 23 last; the text ended at 41 words"
    expect(page.locator("#chart .axis")).to_have_text("words so far")


def test_a_tilt_is_told_in_tokens_and_shown_in_words(page: Page) -> None:
    """As those so far: 9 tokens are 2 words."""
    page.get_by_label("Unit").select_option("words")
    page.locator(".modes label", has_text="tilt").click()
    compare(page, "one two three")
    page.locator("#guided .text span").nth(2).hover()
    told = "2 words so far · 4.4 expected behind it"
    expect(page.locator("#guided .token")).to_contain_text(told)


def test_units_of_the_dial(page: Page) -> None:
    page.reload()
    goal, slider = page.get_by_label("Goal").nth(1), page.get_by_role("slider", name="Goal")
    unit = page.get_by_label("Unit")
    assert unit.locator("option").all_inner_texts() == ["words", "characters", "tokens"]
    expect(unit).to_have_value("words")
    expect(goal).to_have_value("100")
    expect(slider).to_have_attribute("aria-valuetext", "100 words")
    expect(page.locator("#guided .goal")).to_have_text("of 100 words")
    unit.select_option("characters")
    expect(goal).to_have_value("610")
    expect(slider).to_have_attribute("max", "4000")
    expect(page.locator("#bounds")).to_have_text(
        "An end is allowed from 549 to 671 characters; brought about from 580 on."
    )
    goal.fill("155")  # between the steps of the slider
    expect(slider).to_have_attribute("aria-valuetext", "155 characters")
    expect(page.locator("#curl")).to_contain_text('"characters": 155')
    unit.select_option("tokens")
    expect(goal).to_have_value("36")
    expect(slider).to_have_attribute("max", "800")
    unit.select_option("characters")
    expect(goal).to_have_value("155")
    page.locator(".modes label", has_text="range").click()
    expect(page.locator("#python")).to_contain_text('"min_characters": 490, "max_characters": 730')
    unit.select_option("words")
    expect(page.locator("#bounds")).to_contain_text("from 80 to 120 words")


def test_a_text_without_upper_rail_has_room(page: Page) -> None:
    page.locator(".modes label", has_text="at least").click()
    page.get_by_label("Unit").select_option("characters")
    page.get_by_label("Goal").nth(1).fill("4000")
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json))
    compare(page, "one two three")
    (guided,) = (request for request in sent if request and "length_target" in request)
    assert guided["max_tokens"] == 1380  # half as many again as 4,000 characters have
    page.locator("#most").evaluate("most => most.value = 2000")
    compare(page, "one two three")
    assert {request["max_tokens"] for request in sent[-2:] if request} == {2000}


def test_the_page_knows_the_same_sizes(page: Page) -> None:
    sizes = page.evaluate(
        """async () => {
            const { UNITS } = await import("/lenvm/units.js");
            return UNITS.map(({ key, tokens }) => [key, tokens]);
        }"""
    )
    assert dict(sizes) == PRIOR | {"tokens": 1}
