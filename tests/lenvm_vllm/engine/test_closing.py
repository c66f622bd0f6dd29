"""Which candidates end a sentence: by a table, against a search."""

import pytest
import torch

from lenvm_vllm.engine.closing import _in, _table


@pytest.mark.parametrize("ids", [[], [0], [3, 5, 40], [*range(0, 60, 7)]])
def test_a_table_tells_what_a_search_does(ids: list[int]) -> None:
    """Also of tokens behind all that it knows, as vLLM's padding is."""
    tokens = torch.randint(0, 99, (6, 20), generator=torch.Generator().manual_seed(0))
    expected = torch.isin(tokens, torch.tensor(ids, dtype=torch.long))
    assert torch.equal(_in(_table(ids), tokens), expected)
