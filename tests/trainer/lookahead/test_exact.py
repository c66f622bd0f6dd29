"""Values after candidates: one masked pass beside a pass for each candidate."""

import numpy as np
import pytest
import torch

from tests.support.tiny import tiny_model
from trainer.lookahead.exact import check_branches, exact_logits

TEXTS = [np.arange(length) * 7 % 256 for length in (5, 11, 8)]
POSITIONS = [np.array(own) for own in ([0, 4], [3, 4, 10], [7])]


def test_candidates_in_one_row_have_the_values_of_texts_of_their_own() -> None:
    """Rows of several lengths, the last position too, and a candidate twice at a position."""
    model = tiny_model()
    ids = [torch.arange(2 * len(at)).reshape(-1, 2) * 31 % 256 for at in POSITIONS]
    ids[1][2] = 9
    found = exact_logits(model, TEXTS, POSITIONS, ids)
    for text, positions, own, z in zip(TEXTS, POSITIONS, ids, found, strict=True):
        assert z.shape == own.shape
        for row, at in enumerate(positions):
            for column in range(2):
                alone = [*text[: at + 1], int(own[row, column])]
                with torch.inference_mode():
                    expected = model(torch.tensor([alone]))[0, -1]
                torch.testing.assert_close(z[row, column], expected, rtol=1e-4, atol=1e-5)
    assert torch.cat(found).std() > 0.03


def test_layers_that_do_not_look_at_everything_are_refused() -> None:
    model = tiny_model()
    check_branches(model)
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=r"^teacher: layers of 'llama' are .*linear_attention"):
        check_branches(model)
