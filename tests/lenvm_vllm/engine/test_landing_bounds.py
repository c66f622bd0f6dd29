"""Where a landing leaves a text alone: in a thinking, where a code block cannot be closed, below
a grammar, and at `max_kl` 0."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lenvm_vllm.engine.enforce import enforce_inplace
from lenvm_vllm.engine.state import RequestState
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.text.blocks import Blocks
from lenvm_vllm.text.letters import Letters
from lenvm_vllm.text.parts import Markers
from tests.support import toy
from tests.support.real_tokenizers import real

TOKENIZER = real("byte-level")
END = TOKENIZER.eos_token_id
THINK, ANSWER, CALL, CALLED = range(600, 604)
MARKERS = Markers((THINK,), (ANSWER,), {CALL: CALLED})
LETTERS = Letters(TOKENIZER, MARKERS)


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


LINE, FENCED = ids("\n")[0], ids("```")[0]


def text_of(target: dict[str, Any], output: list[int], prefix: str = "") -> RequestState:
    asked = LengthTarget.parse(target | ({"prefix_tokens": len(ids(prefix))} if prefix else {}))
    counter = LETTERS.counter(asked.unit, False)
    return RequestState(asked, [9, *ids(prefix)], output, [END], MARKERS, counter, 400)


def after(state: RequestState, *closed: int) -> list[int]:
    """Tokens of which one has to come; those that are `closed` have been removed."""
    logits = torch.zeros(1, len(TOKENIZER))
    logits[0, list(closed)] = -math.inf
    state.renew()
    enforce_inplace(logits, {0: state}, LETTERS)
    assert logits[0, list(closed)].isneginf().all()
    open_ = logits[0].isfinite().nonzero()[:, 0].tolist()
    assert open_
    return open_ if len(open_) < 3 else []


# ---- what stands before an answer is none of it


def test_a_text_begins_behind_its_last_thinking_or_call() -> None:
    state = text_of({"tokens": 50, "scope": "answer"}, ids("a"))
    for more, written in [
        ([THINK, *ids("x```y")], ids("x```y")),
        ([ANSWER, *ids("b.")], ids("b.")),
        ([CALL, *ids("c"), CALLED], []),
        (ids("d"), ids("d")),
    ]:
        state.output_ids += more
        state.renew()
        assert state.written == written
    prefixed = text_of({"tokens": 50}, ids("b"), "Code:\n```\n")
    assert prefixed.written == ids("Code:\n```\n") + ids("b")


@pytest.mark.parametrize("target", [{"tokens": 4}, {"words": 2}, {"characters": 3}])
def test_a_fence_of_a_thinking_opens_nothing_in_the_answer(target: dict[str, Any]) -> None:
    asked = target | {"scope": "answer", "tolerance": 0}
    state = text_of(asked, [THINK, *ids("\n```\nx"), ANSWER])
    assert state.target.scope == "answer"
    for text in ("", " a", " b", " c"):
        state.output_ids += ids(text)
        assert after(state) in ([], [END])


def test_line_ends_behind_a_thinking_are_no_whole_answer() -> None:
    state = text_of(
        {"tokens": 6, "scope": "answer"}, [THINK, *ids("So it is."), ANSWER, *ids("\n\n")]
    )
    assert not LETTERS.ends_sentence(state.written)


def test_a_thinking_is_not_read_for_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be in each step, as long as the answer has not begun."""
    monkeypatch.delattr(Blocks, "is_open")
    assert after(text_of({"characters": 40, "scope": "answer"}, [THINK, *ids("\n```\nx")])) == []


def test_a_block_is_read_once_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    decode = Blocks.is_open.__globals__["decoded"]
    monkeypatch.setitem(
        Blocks.is_open.__globals__, "decoded", lambda *args: (read.append(args), decode(*args))[1]
    )
    text, sentences = [*ids("```\nsome = 1\n"), 605], LETTERS.sentences
    assert sentences is not None
    sentences.is_whole(text)
    sentences.ends(text, [LINE])
    sentences.begun_too_late(text, False)
    assert len(read) == 1


# ---- blocks that cannot be closed


def test_a_closed_block_is_no_rail_that_gave_way() -> None:
    state = text_of({"words": 4, "mode": "at_most"}, ids("```\nx y"))
    for token in (LINE, FENCED, END):
        assert after(state) == [token]
        state.output_ids.append(token)
    state.renew()
    assert not state.gave_way


@pytest.mark.parametrize("closed", [LINE, FENCED])
def test_an_end_is_forced_where_a_block_cannot_be_closed(closed: int) -> None:
    """By an allow-list, which keeps no room free either."""
    text = "```\nx" if closed == LINE else "```\nx\n"
    size = len(text)
    for amount, due in (size + 4, []), (size, [END]):
        state = text_of({"characters": amount, "tolerance": 0}, ids(text))
        assert after(state, closed) == due
        assert state.reserved == 0
    tokens = text_of({"tokens": len(ids(text)) + 1, "tolerance": 0}, ids(text))
    assert after(tokens, closed) == [END]
    assert not tokens.gave_way


@pytest.mark.parametrize(
    ("unit", "left", "due"),
    [
        *[("tokens", 3, LINE), ("tokens", 2, None), ("tokens", 1, END)],
        *[("characters", 4, LINE), ("characters", 3, None), ("characters", 0, END)],
    ],
)
def test_a_block_of_the_prompt_is_closed_if_there_is_room(
    unit: str, left: int, due: int | None
) -> None:
    """Tokens with the end, a line's end and a fence."""
    prefix = "```\nx"
    size = len(ids(prefix)) if unit == "tokens" else len(prefix)
    state = text_of({unit: size + left, "mode": "at_most"}, [], prefix)
    assert after(state) == ([] if due is None else [due])


def test_the_end_comes_at_a_wall_in_an_open_block() -> None:
    state = text_of({"characters": 60, "mode": "at_most"}, ids("```\nx" + "=" * 50))
    state.max_tokens = len(state.output_ids) + 1
    assert after(state) == [END]


# ---- filling


class Whole:
    """A sentence has ended, and none fits; token 20 is an empty line."""

    ids, breaks, line = (20,), (20,), 20

    def is_whole(self, text: list[int], own: Tensor) -> bool:
        return True

    def tokens_a_sentence(self, text: list[int]) -> float:
        return 100.0

    def ends(self, text: list[int], tokens: list[int]) -> list[bool]:
        return [True for _ in tokens]


def written(state: RequestState) -> tuple[list[int], list[int]]:
    """(W,) tokens of which a step wrote something, and those that may come."""
    logits = toy.flat_logits(1, (toy.EOS, 10, 20, 40, 80))
    logits[:, toy.EOS] = -math.inf if state.held else 0.0
    writes = toy.guide_of(toy.Server(), Whole()).plan(logits, {0: state})
    if writes is None:
        return [], []
    writes.apply_inplace(logits)
    return writes.ids.tolist(), logits[0].isfinite().nonzero()[:, 0].tolist()


def test_a_whole_text_is_filled_unless_a_grammar_binds_it_or_it_is_left_alone() -> None:
    def text(**target: Any) -> RequestState:
        return toy.request({"tokens": 30, "tolerance": 0, **target}, output=[50] * 27)

    assert written(text())[1] == [20]
    assert written(text(max_kl=0))[1] != [20]
    bound = text()
    bound.has_grammar = True
    assert written(bound)[1] != [20]


def test_an_open_thinking_is_not_filled() -> None:
    """Its ends are held for the answer that is to come, and not for a rail."""
    target = {"tokens": 30, "tolerance": 0.3}
    thinking = toy.request(target, output=[60, *[50] * 26], markers=Markers((60,), (61,), {}))
    assert thinking.held
    assert written(thinking)[1] != [20]


def test_no_text_that_is_left_alone_ends_before_its_landing() -> None:
    def text(**target: Any) -> RequestState:
        return toy.request({"tokens": 100, "tolerance": 0.1, **target}, output=[50] * 91)

    assert written(text())[1] == [toy.EOS]
    assert written(text(max_kl=0))[1] != [toy.EOS]


def test_an_end_is_no_end_of_a_sentence_besides() -> None:
    """A step would write it twice, or here raise it though it is none of the cut."""
    state = toy.request({"tokens": 30}, output=[50] * 28, eos_ids=[toy.EOS, 20])
    whole = Whole()
    whole.is_whole = lambda text, own: False  # type: ignore[method-assign]
    logits = toy.flat_logits(1, (toy.EOS, 10, 20, 40, 80))
    logits[:, [toy.EOS, 20]] = torch.tensor([-9.0, -7.0])
    writes = toy.guide_of(toy.Server(), whole).plan(logits, {0: state})
    assert writes is not None
    assert sorted(writes.ids.tolist()) == [10, 40, 80]
