"""Code blocks: whether one is open, and what closes it."""

import random

import pytest

from lenvm_vllm.text.blocks import FENCE, LONGEST_CLOSING, Blocks
from lenvm_vllm.text.tokenizer import texts_of
from tests.support.real_tokenizers import NAMES, real


def blocks_of(name: str) -> Blocks:
    tokenizer = real(name)
    return Blocks(tokenizer, texts_of(tokenizer))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["Code:\n```python\nx = 1", "```\ny\n```\nand\n```\n  x(`", "```"])
def test_an_open_block_closes_in_its_last_tokens(name: str, text: str) -> None:
    """Whatever stands before them, and whether it is counted or forced at once."""
    tokenizer, blocks = real(name), blocks_of(name)
    written = tokenizer.encode(text, add_special_tokens=False)
    assert blocks.is_open(written)
    assert 2 <= len(blocks.closing) <= LONGEST_CLOSING
    counted, now = list(written), list(written)
    assert blocks.closing_in(len(blocks.closing) + 1) == blocks.closing_in(0) == []
    for left in range(len(blocks.closing), 0, -1):
        counted += blocks.closing_in(left)
        now += blocks.rest(now)[:1]
    for made in (counted, now):
        assert tokenizer.decode(made).endswith("\n```")
        assert not blocks.is_open(made)


@pytest.mark.parametrize("name", NAMES)
def test_texts_outside_of_blocks(name: str) -> None:
    tokenizer, blocks = real(name), blocks_of(name)
    for text in ("", "It ends.", "the `x` of ``y``", "```\nx\n```", "```\nx\n```\nIt"):
        assert not blocks.is_open(tokenizer.encode(text, add_special_tokens=False))


def test_a_long_text_is_decoded_at_its_backticks_alone() -> None:
    """A step asks of each text in its landing: once a token it was all of an engine's time."""
    tokenizer, blocks, rng = real("byte-level"), blocks_of("byte-level"), random.Random(0)
    some = ["`", "``", "```", "\n", "\n\n", " ", "  ", "x", "```\n", "`\n", "\n```\n", "é", ".`"]
    pieces = [token for text in some for token in tokenizer.encode(text, add_special_tokens=False)]
    for _ in range(20):
        text = rng.choices(pieces, k=rng.randint(1, 60))
        open_ = len(FENCE.findall(tokenizer.decode(text))) % 2 == 1
        assert blocks.is_open(text) == (open_ and blocks.may_have(text))
    text = list(tokenizer.encode("Code:\n```python\nx = 1", add_special_tokens=False))
    before = blocks.text_of.cache_info().misses
    for _ in range(100):
        assert blocks.is_open(text)
        text.append(tokenizer.encode("y", add_special_tokens=False)[0])
    assert blocks.text_of.cache_info().misses == before + 1
