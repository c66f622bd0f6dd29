"""A length in words and characters: what a prompt tells of it, and how it is printed."""

from typing import Any

import httpx
import pytest

from lenvm_vllm.commands import predict as command
from lenvm_vllm.commands.predict import predict
from lenvm_vllm.values.endpoint import http_client
from tests.support.tiny import tiny_tokenizer
from value_server.contract.units import CHARACTERS, PRIOR, WORDS, tokens_per_unit
from value_server.http.text import TextRequest, Texts

CHINESE = "请写一首关于春天的诗。要短。"  # 14 characters, 12 words, three bytes each
END = 256


def told(**request: Any) -> tuple[float | None, float | None]:
    """Words and characters of an answer of 101 tokens, the end among them."""
    texts = Texts(tiny_tokenizer())
    found = texts.prediction(TextRequest(**request), 101.0)
    assert found.predicted_tokens == 101.0
    return found.predicted_words, found.predicted_characters


def by(tokens: int, words: int, characters: int) -> Any:
    """The same where the prompt has so many."""
    each = tokens_per_unit(WORDS, tokens, words), tokens_per_unit(CHARACTERS, tokens, characters)
    return pytest.approx([100 / ratio for ratio in each])


def test_the_prompts_language_tells_how_many_tokens_a_word_takes() -> None:
    assert told(prompt=CHINESE) == by(42, 12, 14)  # a token a byte
    assert told(prompt="two words") == by(9, 2, 9)
    longer = told(prompt=CHINESE * 50)
    assert longer == by(2100, 600, 700)
    assert longer[1] == pytest.approx(100 / 3, rel=0.01)  # the prior counts less and less


def test_the_chat_template_tells_nothing() -> None:
    user = {"role": "user", "content": CHINESE}
    assert told(messages=[user]) == told(prompt=CHINESE)
    parts = [{"type": "text", "text": "two"}, {"type": "image_url", "image_url": {}}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    talk.append({"role": "user", "content": "words"})
    assert told(messages=talk) == by(9, 2, 9)
    assert told(messages=[{"role": "user", "content": ""}]) == by(0, 0, 0)


def test_token_ids_are_read_as_text() -> None:
    ids = tiny_tokenizer()(CHINESE)["input_ids"]
    assert told(token_ids=[*ids, END]) == told(prompt=CHINESE)
    unknown = Texts(None).prediction(TextRequest(token_ids=ids), 101.0)
    assert unknown.model_dump() == {
        "predicted_tokens": 101.0,
        "predicted_words": None,
        "predicted_characters": None,
    }


def test_an_answer_that_is_all_end_has_no_words() -> None:
    found = Texts(tiny_tokenizer()).prediction(TextRequest(prompt="hi"), 0.4)
    assert (found.predicted_words, found.predicted_characters) == (0.0, 0.0)


def test_the_prior_is_what_a_text_without_words_tells() -> None:
    for tokens in (0, 30):
        assert {unit: tokens_per_unit(unit, tokens, 0) for unit in PRIOR} == pytest.approx(PRIOR)


def test_a_short_sentence_in_another_script_outweighs_the_prior() -> None:
    """Fifteen ideographs of two tokens each: not the 0.23 of English letters, nor near it."""
    assert tokens_per_unit(CHARACTERS, 30, 15) == pytest.approx(1.56, abs=0.01)
    assert tokens_per_unit(WORDS, 30, 15) == pytest.approx(1.85, abs=0.01)
    assert tokens_per_unit(CHARACTERS, 6, 20) == pytest.approx(0.23 + 6 / 16 * 0.07)


# ---- the command


def shown(answers: list[Any], monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Run it against servers that give these answers, one after the other."""

    def reply(request: httpx.Request) -> httpx.Response:
        answer = answers.pop(0)
        if isinstance(answer, int):
            return httpx.Response(answer)
        is_page = isinstance(answer, str)
        return httpx.Response(200, text=answer) if is_page else httpx.Response(200, json=answer)

    def client(url: str, **how: Any) -> httpx.Client:
        return http_client(url, transport=httpx.MockTransport(reply), **how)

    monkeypatch.setattr(command, "http_client", client)
    monkeypatch.setenv("LENVM_URL", "http://one,http://two")
    predict("hi", **options)


ALL = {"predicted_tokens": 120.04, "predicted_words": 85.1, "predicted_characters": 518.0}


@pytest.mark.parametrize(
    ("answer", "options", "lines"),
    [
        (ALL, {}, ["120.0 tokens", "85.1 words", "518.0 characters"]),
        (ALL, {"unit": "tokens"}, ["120.0"]),
        (ALL, {"unit": "characters"}, ["518.0"]),
        (ALL | {"predicted_words": None}, {}, ["120.0 tokens", "518.0 characters"]),
        ({"predicted_tokens": 120.04}, {}, ["120.0 tokens"]),  # an older server's
    ],
)
def test_what_is_printed(
    answer: Any,
    options: Any,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown([500, answer], monkeypatch, **options)
    assert capsys.readouterr().out.splitlines() == lines


def test_no_server_that_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"http://one: 503 \nhttp://two: an older .* no words"):
        shown([503, {"predicted_tokens": 5.0}], monkeypatch, unit="words")
    with pytest.raises(SystemExit, match=r"http://one: Expecting value.*\nhttp://two: 503"):
        shown(["<html>", 503], monkeypatch)
