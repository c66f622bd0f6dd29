"""The served model's likeliest next tokens, beside a softmax of each text alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from trainer.lookahead.served import ServedModel, end_ids

CPU = torch.device("cpu")


def test_the_likeliest_that_do_not_end_the_text(base: Path) -> None:
    """Texts of several lengths at once; the end is made the likeliest token of all."""
    served = ServedModel(str(base), torch.float32, CPU)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for model in (served.model, plain):
        with torch.no_grad():
            model.lm_head.weight[256] = 3 * model.lm_head.weight.abs().max()
    texts = [np.arange(length) for length in (4, 9)]
    positions = [np.array([1, 3]), np.array([0, 2, 8])]
    found = served.candidates(texts, positions, 5)
    for text, at, (ids, p) in zip(texts, positions, found, strict=True):
        with torch.inference_mode():
            whole = plain(torch.from_numpy(text)[None]).logits[0, torch.from_numpy(at)].softmax(-1)
        expected, order = whole.index_fill(1, torch.tensor([256]), 0).topk(5)
        assert ids.tolist() == order.tolist()
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-7)
        assert (p.diff() <= 0).all()


def test_all_ends_count(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    assert end_ids(model) == [256]
    model.generation_config.eos_token_id = [256, 7]
    assert end_ids(model) == [7, 256]
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    assert end_ids(model) == []


def test_a_model_without_an_end_has_all_tokens(base: Path) -> None:
    served = ServedModel(str(base), torch.float32, CPU)
    served.ends = served.ends[:0]
    ((ids, p),) = served.candidates([np.arange(3)], [np.array([2])], 258)
    assert sorted(ids[0].tolist()) == [*range(258)]
    assert p.sum().item() == pytest.approx(1)


def test_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model: .*nothing.* does not load"):
        ServedModel(str(tmp_path / "nothing"), torch.float32, CPU)
