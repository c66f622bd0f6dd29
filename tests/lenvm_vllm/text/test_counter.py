"""Words and characters: what they are, and that no text has one more than it may."""

import random
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.text.counter import Closed, TokenUnits, _most_of
from lenvm_vllm.text.letters import Letters
from lenvm_vllm.text.parts import Markers
from lenvm_vllm.values.client import TimedOut
from tests.support import fakes
from tests.support.real_tokenizers import NAMES, real
from value_server.contract.units import count, follow_words

WORDS, CHARACTERS = "words", "characters"
END = 2  # of the vocabularies that are used here, a special token
SCRIPTS = (
    "Hello, world! It's 5 o'clock - isn't it?\n\n* **one**  two",
    "你好，世界。今天天气很好！我们去公园散步吧？",  # noqa: RUF001
    "カタカナとひらがな、漢字も書きます。",
    "مرحبا بالعالم، كيف حالك اليوم؟",
    "สวัสดีครับ วันนี้อากาศดี",
    "नमस्ते दुनिया।",
    "👩‍👩‍👧 🏳️‍🌈 e\u0301 \u0915\u094d\u0937 🤷🏽‍♂️!",
    "안녕하세요 세계",
)


@cache
def letters(name: str) -> Letters:
    return Letters(real(name), Markers())


def test_what_begins_a_character_tells_the_most_that_it_can_add() -> None:
    for code in range(0x80, 0x110000):
        if not 0xD800 <= code < 0xE000:
            bytes_of = chr(code).encode()
            for place in range(4):
                adds = follow_words(chr(code), place)[0]
                for have in range(1, len(bytes_of)):
                    assert adds <= _most_of(bytes_of[:have], WORDS, place)


@pytest.mark.parametrize("text", [SCRIPTS[i] for i in (0, 3, 4, 5, 6, 7)])
def test_where_no_ideographs_are_it_is_what_split_finds(text: str) -> None:
    assert count(text, WORDS) == len(text.split())


def client(tokenizer: Any, prompt: list[int], **fields: Any) -> Any:
    """What makes the text of a completion that a client of vLLM gets."""
    request = SimpleNamespace(
        sampling_params=SamplingParams(**fields),
        prompt_token_ids=prompt,
        prompt_embeds=None,
        request_id="x",
    )
    return IncrementalDetokenizer.from_new_request(tokenizer, request)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unit", [WORDS, CHARACTERS])
@pytest.mark.parametrize("before", ["Say it:", ""])
def test_counts_what_the_client_gets(name: str, unit: str, before: str) -> None:
    """Of texts in all scripts, and of random tokens where they may stand."""
    tokenizer, known, rng = real(name), letters(name), random.Random(unit)
    if name == "tekken" and not before:
        before = " "  # its prompts begin with a special token
    prompt = tokenizer.encode(before)
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in SCRIPTS]
    for text in [*texts, *[None] * 12]:
        counter, got = known.counter(unit, specials=False), client(tokenizer, prompt)
        assert counter is not None
        counter.restart(prompt)
        for step in range(30 if text is None else len(text)):
            closed = counter.closed(None, "cpu")
            token = anything(known, closed, rng) if text is None else text[step]
            assert not closed.mask[token]
            counter.follow(token)
            got.update([token], False)
            if not counter.pending:
                assert counter.amount == count(got.output_text, unit)
        assert counter.tokens > 0


def anything(known: Letters, closed: Closed, rng: random.Random) -> int:
    """An open token, often one that is not whole characters."""
    pool = list(known.characters.pieces) if rng.random() < 0.5 else []
    is_open = [token for token in pool if not closed.mask[token]]
    return rng.choice(is_open or (~closed.mask).nonzero()[:, 0].tolist())


def test_special_tokens_count_where_they_are_shown() -> None:
    tokenizer, special = real("byte-level"), "<|im_start|>"
    (token,) = tokenizer.encode(special)
    for specials, characters in ((False, 0), (True, len(special))):
        counter = letters("byte-level").counter(CHARACTERS, specials)
        assert counter is not None
        counter.follow(token)
        got = client(tokenizer, tokenizer.encode("a"), skip_special_tokens=not specials)
        got.update([token], False)
        assert counter.amount == len(got.output_text) == characters


def test_other_texts_of_some_tokens_are_as_if_all_were_made_anew() -> None:
    plain = letters("byte-level")._plain
    assert plain is not None
    size = len(plain.texts)
    closer = plain._closes.nonzero()[0][0].item()
    some = {END: "</s>", closer: "", 640: "", 2215: " a. ", size + 3: " two words."}
    changed = plain.but(some)
    anew = TokenUnits(plain.texts | some, plain.pieces, plain._closing, plain.strips)
    assert changed.texts == anew.texts
    for name in ("_characters", "_words", "_goes_on", "_closes"):
        assert (getattr(changed, name) == getattr(anew, name)).all()
        assert (getattr(changed, name)[..., :size] != getattr(plain, name)).any()


def test_a_space_is_there_behind_words_however_long_ago() -> None:
    """A picture is hundreds of special tokens behind the words of a prompt."""
    tokenizer = real("sentencepiece")
    prompt, text = [*tokenizer.encode("Say it"), *[END] * 100], tokenizer.encode("hi")[-1:]
    counter, got = letters("sentencepiece").counter(CHARACTERS, False), client(tokenizer, prompt)
    assert counter is not None
    counter.restart(prompt)
    counter.follow(*text)
    got.update(text, False)
    assert counter.amount == len(got.output_text) == len(" hi")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("lenvm_vllm.engine.rows.tokenizer_of", lambda config: real(request.param))
    monkeypatch.setattr("lenvm_vllm.engine.rows.Letters", lambda *_: letters(request.param))
    return str(request.param)


def rows_without_values() -> EngineRows:
    return EngineRows(fakes.config(), fakes.replicas_of(fakes.Server(TimedOut("slow"))))


def write(
    rows: EngineRows,
    tokenizer: Any,
    length: dict[str, Any],
    seed: int,
    script: str,
    max_tokens: int = 600,
    only: list[int] | None = None,
) -> tuple[str, RequestState]:
    """A text of a model that writes this script in ever new orders and never ends by itself; with
    `only` these tokens, as of a grammar."""
    rng = torch.Generator().manual_seed(seed)
    prompt = tokenizer.encode("Say it:")
    made = SamplingParams(extra_args=LengthTarget.parse(length).to_xargs(), max_tokens=max_tokens)
    made.update_from_generation_config({}, END)
    state = rows.open(made, prompt, [])
    assert state is not None
    liked = torch.tensor(tokenizer.encode(script, add_special_tokens=False))
    got = client(tokenizer, prompt)
    while END not in state.output_ids and len(state.output_ids) < max_tokens:
        logits = torch.randn(1, len(tokenizer), generator=rng)
        logits[0, liked] += 12
        logits[0, END] = -5
        if only is not None:
            shut = torch.ones(len(tokenizer), dtype=torch.bool).index_fill(0, torch.tensor(only), 0)
            logits[0, shut] = -torch.inf
        rows.steer_inplace(logits, {0: state})
        token = int(torch.multinomial(logits[0].softmax(-1), 1, generator=rng))
        state.output_ids.append(token)
        got.update([token], token == END)
    rows.close(state)
    return str(got.output_text), state


@pytest.mark.parametrize(
    ("unit", "script"),
    [
        (WORDS, SCRIPTS[0]),
        (WORDS, SCRIPTS[1]),
        (WORDS, SCRIPTS[3]),
        (CHARACTERS, SCRIPTS[0]),
        (CHARACTERS, SCRIPTS[4]),
        (CHARACTERS, SCRIPTS[6]),
    ],
)
def test_no_limit_is_passed(name: str, unit: str, script: str) -> None:
    rows = rows_without_values()
    for seed, size in enumerate((1, 2, 7, 30)):
        for length, least, most in (
            ({unit: size, "mode": "at_most"}, 0, size),
            ({unit: size, "tolerance": 0}, size, size),
            ({unit: size, "tolerance": 0.25}, 0.75 * size, 1.25 * size),
            ({f"min_{unit}": size, f"max_{unit}": 2 * size, "mode": "range"}, size, 2 * size),
        ):
            text, state = write(rows, real(name), length, seed, script)
            assert least <= count(text, unit) <= most
            assert "\ufffd" not in text
            assert not state.gave_way
            assert state.output_ids[-1] == END


@pytest.mark.parametrize("name", ["byte-level"], indirect=True)
@pytest.mark.parametrize(
    ("length", "fields"),
    [
        # max_tokens comes before the lower rail, whose end is held back.
        ({"characters": 10, "tolerance": 0}, {"max_tokens": 3}),
        # What is allowed makes no text that has both rails.
        ({"characters": 9, "tolerance": 0}, {"only": [" hello", "END"]}),
        ({"characters": 8, "tolerance": 0}, {"only": [" hello", "END", "你"]}),
        # A grammar has no end where the limit is, but tokens that are no other word.
        ({"words": 3, "mode": "at_most"}, {"max_tokens": 12, "only": [" hello", "llo"]}),
    ],
)
def test_the_upper_rail_goes_first(
    name: str, length: dict[str, Any], fields: dict[str, Any]
) -> None:
    tokenizer = real(name)
    if words := fields.get("only"):
        found = [[END] if w == "END" else tokenizer.encode(w) for w in words]
        fields = fields | {"only": [token for ids in found for token in ids]}
    unit = next(iter(length))
    for seed in range(8):
        text, _ = write(rows_without_values(), tokenizer, length, seed, " international", **fields)
        assert count(text, unit) <= length[unit]
        assert "\ufffd" not in text


def step(
    rows: EngineRows, length: dict[str, Any], text: str, liked: dict[str, float], prompt: str = "?"
) -> list[str]:
    """What may come behind a text, of a model that likes these next tokens."""
    tokenizer = real("byte-level")
    made = SamplingParams(extra_args=LengthTarget.parse(length).to_xargs(), max_tokens=600)
    made.update_from_generation_config({}, END)
    ids = tokenizer.encode(text, add_special_tokens=False)
    state = rows.open(made, tokenizer.encode(prompt), ids)
    assert state is not None
    logits = torch.zeros(1, len(tokenizer))
    for word, nats in liked.items():
        (token,) = tokenizer.encode(word, add_special_tokens=False) if word else (END,)
        logits[0, token] = nats
    rows.steer_inplace(logits, {0: state})
    is_open = logits[0].isfinite() & (logits[0] >= 5)
    return sorted(str(tokenizer.decode([i])) for i in is_open.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("name", ["byte-level"], indirect=True)
@pytest.mark.parametrize(
    ("liked", "comes"),
    [
        # Most of it goes on with the word.
        ({"ycle": 20.0, ".": 18.0, " and": 17.0}, ["ycle"]),
        # The word is whole, and a full stop is possible.
        ({" and": 20.0, ".": 18.0, ",": 18.0}, ["."]),
        # Neither: the text ends as it is.
        ({" and": 20.0, ",": 18.0, ".": 8.0}, []),
    ],
)
@pytest.mark.parametrize(
    ("length", "text"),
    [({"words": 3}, "ride a bic"), ({"characters": 90}, "I ride " * 11 + "a bic")],
)
def test_the_last_word_is_ended(
    name: str, length: dict[str, Any], text: str, liked: dict[str, float], comes: list[str]
) -> None:
    """END is not liked, and has to be forced."""
    found = step(rows_without_values(), length | {"mode": "at_most"}, text, liked)
    assert found == comes


@pytest.mark.parametrize("name", ["byte-level"], indirect=True)
def test_what_the_prompt_has_of_the_text_counts(name: str) -> None:
    rows = rows_without_values()
    prefix = len(real("byte-level").encode(" one two"))
    length = {"words": 3, "mode": "at_most", "prefix_tokens": prefix}
    assert step(rows, length, " three", {" four": 20.0, ".": 19.0}, "Say: one two") == ["."]
    assert step(rows, length, "", {" four": 20.0}, "Say: one two") == [" four"]
