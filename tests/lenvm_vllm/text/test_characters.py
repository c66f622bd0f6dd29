"""Characters of several tokens are whole at the end of a text, wherever its rail stands."""

import math
import random

import pytest
import torch
from torch import Tensor

from lenvm_vllm.engine.rows import EngineRows
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.text.characters import Characters
from lenvm_vllm.text.tokenizer import decoded, texts_of
from lenvm_vllm.values.client import TimedOut
from tests.support import fakes
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()  # a token a byte
END = TOKENIZER.eos_token_id
LETTERS = ("a", "é", "語", "😀")


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def characters() -> Characters:
    return Characters.of(TOKENIZER, texts_of(TOKENIZER))


@pytest.mark.parametrize("letter", LETTERS)
def test_missing_bytes(letter: str) -> None:
    known, ids = characters(), ids_of("語a" + letter)
    size = len(letter.encode())
    for have in range(1, size + 1):
        assert known.missing(ids[: len(ids) - size + have]) == size - have
    assert known.missing([]) == 0
    assert known.missing(ids_of("語")[1:]) == 0  # the tail of another text


def test_tokens_of_more_than_a_byte_and_bytes_by_number() -> None:
    pieces = {1: b" \xe8\xaa", 2: b"\x9e\xe8", 3: b"\xaa\x9e"}
    known = Characters(pieces)
    assert [known.missing(text) for text in ([1], [1, 2], [1, 2, 3], [1, 9])] == [1, 2, 0, 0]
    assert known.unfinished([], 1) == [2]
    assert known.unfinished([1], 1) == [2]
    assert known.continuing([1], 2) == [2, 3]

    class Bytes:
        def convert_ids_to_tokens(self, ids: list[int], skip_special_tokens: bool) -> list[str]:
            return {5: ["<0xE8>"], 7: ["odd \ufffd"]}[ids[0]]

    for token, missing in ((5, 2), (7, 0)):  # one that does not tell its bytes is left alone
        made = Characters.of(Bytes(), {token: "\ufffd", 8: "so"})
        assert made.missing([token]) == missing


def next_logits(text: list[int], rng: random.Random) -> Tensor:
    """Of a model that writes whole letters, and would end at any time."""
    logits = torch.full((len(TOKENIZER),), -math.inf)
    begun = [ids_of(letter) for letter in LETTERS]
    for size in (3, 2, 1):
        if rest := [ids[size] for ids in begun if len(ids) > size and text[-size:] == ids[:size]]:
            logits[rest] = 0.0
            logits[END] = -3.0
            return logits
    logits[[ids[0] for ids in begun]] = torch.tensor([0.1, 1.0, 2.0, 5.0])
    logits[END] = 2.0
    return logits


def rows_without_values() -> EngineRows:
    return EngineRows(fakes.config(), fakes.replicas_of(fakes.Server(TimedOut("slow"))))


@pytest.mark.parametrize("mode", ["equal_to", "at_most"])
def test_no_text_ends_in_a_character(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lenvm_vllm.engine.rows.tokenizer_of", lambda config: TOKENIZER)
    rows, rng = rows_without_values(), random.Random(0)
    for tokens in [*range(2, 14)] * 4:
        target = LengthTarget.parse({"mode": mode, "tokens": tokens, "tolerance": 0.0})
        state = RequestState(target, [1], [], [END])
        while state.output_ids[-1:] != [END]:
            logits = next_logits(state.output_ids, rng)[None]
            rows.steer_inplace(logits, {0: state})
            p = torch.softmax(logits[0], dim=-1).tolist()
            state.output_ids.append(rng.choices(range(len(p)), p)[0])
        assert "\ufffd" not in TOKENIZER.decode(state.output_ids[:-1])
        count = len(state.output_ids)
        assert count == tokens if mode == "equal_to" else count <= tokens


def test_the_rail_stands_where_a_grammar_leaves_no_whole_character() -> None:
    """Where only the first byte of one is allowed, it comes; then the end is forced."""
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        patched.setattr("lenvm_vllm.engine.rows.tokenizer_of", lambda config: TOKENIZER)
        rows = fakes.rails_only(rows_without_values())
    target = LengthTarget.parse({"tokens": 2, "tolerance": 0.0})
    state, first = RequestState(target, [1], [], [END]), ids_of("語")[0]
    logits = torch.full((1, len(TOKENIZER)), -math.inf)
    logits[0, [first, END]] = 0.0
    rows.steer_inplace(logits, {0: state})
    assert logits[0].isfinite().nonzero()[:, 0].tolist() == [first]
    state.output_ids.append(first)
    logits = torch.zeros(1, len(TOKENIZER))
    rows.steer_inplace(logits, {0: state})
    assert logits[0].isfinite().nonzero()[:, 0].tolist() == [END]


def test_no_space_is_cleaned_up() -> None:
    """vLLM does not, whatever the files of a slow tokenizer say."""

    class Slow:
        clean_up_tokenization_spaces = True

        def decode(
            self,
            ids: list[int],
            skip_special_tokens: bool,
            clean_up_tokenization_spaces: bool | None = None,
        ) -> str:
            return "a." if clean_up_tokenization_spaces is not False else "a ."

    assert decoded(Slow(), [1, 2]) == "a ."
