"""Code blocks: whether one is open, and what closes it."""

import pytest

from lenvm_vllm.text.blocks import LONGEST_CLOSING, Blocks
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
