"""Weights of 4 bits and attention without a dense mask, as far as a CPU can tell.

Neither trains here: bitsandbytes is not installed, and nothing but sdpa has a backward pass.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModel, PreTrainedModel

import trainer.training.backbone
import trainer.training.memory
from tests.support.tiny_llm import tiny_qwen
from tests.support.training import run, training
from trainer.data import PackedDataset, Rollout, collate, make_example
from trainer.training.backbone import Backbone
from value_server.contract.checkpoint import CheckpointError, LenvmConfig, read_config
from value_server.model.backbone import load_backbone

FLASH = "flash_by_hand"
ROWS: list[int] = []  # of each call of it


def config(base: Path, **options: Any) -> LenvmConfig:
    facts = {"weights": "adapter", "num_layers": 2, "tokenizer_fingerprint": "a" * 64}
    return LenvmConfig(gamma=0.99, base_model=str(base), **facts, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_frozen_weights_are_read_in_4_bits(
    dtype: torch.dtype, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def from_pretrained(_source: str, **options: Any) -> None:
        asked.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(AutoModel, "from_pretrained", from_pretrained)
    backbone = Backbone(model=str(base), tune="lora", quantize="4bit", attention="flash")
    with pytest.raises(CheckpointError, match="enough"):
        backbone.build(config(base), dtype)
    own = asked["quantization_config"]
    assert own.load_in_4bit
    assert (own.bnb_4bit_quant_type, own.bnb_4bit_use_double_quant) == ("nf4", True)
    assert own.bnb_4bit_compute_dtype == asked["dtype"] == dtype
    assert asked["attn_implementation"] == "flash_attention_2"
    with pytest.raises(CheckpointError, match="enough"):
        Backbone(model=str(base)).build(config(base), dtype)
    assert (asked["quantization_config"], asked["attn_implementation"]) == (None, "sdpa")


@pytest.mark.parametrize(
    ("options", "gpu", "message"),
    [
        ({"quantize": "8bit"}, True, r"^quantize: '8bit', must be one of 4bit$"),
        ({"quantize": "4bit", "tune": "full"}, True, r"^quantize: '4bit', .* with tune full"),
        ({"quantize": "4bit"}, True, r"^quantize: '4bit', .*`pip install bitsandbytes` first$"),
        ({"attention": "eager"}, True, r"^attention: 'eager', must be one of sdpa, flex, flash$"),
        ({"attention": "flex"}, False, r"^attention: 'flex', must be sdpa without a GPU$"),
        ({"attention": "flash"}, True, r"^attention: 'flash', .*`pip install flash-attn` first$"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    options: dict[str, Any],
    gpu: bool,
    message: str,
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer.training.memory, "find_spec", lambda _module: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path / "out", base, **options)
    assert not (tmp_path / "out").exists()


def test_flash_attention_needs_half_precision(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.training.memory, "find_spec", lambda _module: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"^attention: 'flash', must be sdpa or flex without bf16"):
        training(base, attention="flash", bf16=False).check()
    training(base, attention="flash", bf16=True).check()


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_an_adapter_on_4_bits_learns_as_one_on_whole_weights(data: Path, tmp_path: Path) -> None:
    curves = []
    for name, more in (("whole", {}), ("quantised", {"quantize": "4bit"})):
        run(data, tmp_path / name, tiny_qwen(tmp_path / "base"), tune="lora", **more)
        facts = read_config(tmp_path / name).training
        assert facts.get("quantize") == more.get("quantize")
        curves.append(facts["loss_curve"])
    assert curves[0] == pytest.approx(curves[1], rel=0.1)
    assert curves[0] != curves[1]


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """Two packs of several texts, of different lengths."""
    ids = np.random.default_rng(0).integers(0, 256, (8, 16))
    texts = [Rollout("p", "", own[:n], own[9:], True) for n, own in enumerate(ids, 1)]
    dataset = PackedDataset([make_example(text, 64) for text in texts], 40, seed=0)
    found = collate([dataset[0], dataset[1]])
    assert len(dataset[0]["labels"]) != len(dataset[1]["labels"])
    return found


def states(base: Path, attention: str, batch: dict[str, Tensor]) -> Tensor:
    """(B, T, H) of packed texts."""
    backbone = load_backbone(str(base), attn_implementation=attention)
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        found = backbone(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    return found.last_hidden_state


def test_flex_attention_tells_packed_texts_apart(base: Path, batch: dict[str, Tensor]) -> None:
    """Its forward pass only, and not as compiled."""
    flex, sdpa = (states(base, name, batch) for name in ("flex_attention", "sdpa"))
    torch.testing.assert_close(flex, sdpa, rtol=1e-4, atol=1e-5)


def by_hand(_module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, **kw: Any) -> Any:
    """As flash-attn in transformers: of one row, each text by itself where positions restart."""
    ROWS.append(len(q))
    assert mask is None
    (positions,) = kw["position_ids"]
    sizes = torch.diff((positions == 0).nonzero()[:, 0], append=torch.tensor([len(positions)]))
    parts = [t.split(sizes.tolist(), dim=2) for t in (q, k, v)]
    own = {"is_causal": True, "scale": kw["scaling"], "enable_gqa": True}
    texts = [scaled_dot_product_attention(*qkv, **own) for qkv in zip(*parts, strict=True)]
    return torch.cat(texts, dim=2).transpose(1, 2), None


def test_flash_attention_gets_packs_in_one_row(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses are those of packs in rows."""
    shape = {"tune": "full", "packs_per_pass": 3, "lookahead": 4}
    run(data, tmp_path / "sdpa", base, **shape)

    def flashing(*args: Any, **kw: Any) -> PreTrainedModel:
        backbone = load_backbone(*args, **kw)
        backbone.config._attn_implementation = FLASH  # transformers would look for the package
        return backbone

    AttentionInterface.register(FLASH, by_hand)
    monkeypatch.setattr(trainer.training.backbone, "load_backbone", flashing)
    run(data, tmp_path / "flash", base, **shape)
    assert {*ROWS} == {1}
    curves = [read_config(tmp_path / name).training["loss_curve"] for name in ("sdpa", "flash")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
