"""The backbone that a value model starts from, and which of its weights train."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from cyclopts import Parameter
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from trainer.checks import check, check_choice, check_positive
from trainer.rollout_files import TokenizerOf
from trainer.training.memory import (
    ATTENTION,
    Attention,
    Quantize,
    check_attention,
    check_quantize,
    quantization,
)
from value_server.contract.checkpoint import LenvmConfig, read_config
from value_server.model.backbone import load_adapter, load_backbone
from value_server.model.sight import check_family
from value_server.model.value_model import ValueHead, ValueModel, read_sight

Tune = Literal["full", "lora", "head"]
WEIGHTS: dict[Tune, str] = {"full": "full", "lora": "adapter", "head": "head"}

SAME = 0.05  # of a state, that it may differ by rounding

# Layers that the attention mask keeps from other texts of a row; and backbones of other layers,
# whose configs do not all say so.
PACKED = {"full_attention", "sliding_attention"}
RECURRENT = {
    *("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm", "jamba", "bamba"),
    *("zamba", "zamba2", "falcon_h1", "nemotron_h", "granitemoehybrid", "minimax", "kimi_linear"),
}


@dataclass(frozen=True, kw_only=True)
class LoraShape:
    """The adapter on every linear layer of the backbone."""

    rank: int = 32
    """Rank of the adapter."""
    alpha: int = 32
    """Its scale is alpha / rank."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A model of the hub or of a folder, and what of it trains beside the head."""

    model: str
    """Hub name or folder of the backbone to start from."""
    base_model: str | None = None
    """Name to write into the checkpoint, where it differs from MODEL and from what START says."""
    num_layers: int | None = None
    """Layers of the backbone to keep, from the bottom; by default all."""
    tune: Tune = "full"
    """The full backbone, a LoRA adapter on it, or the head alone."""
    lora: LoraShape = LoraShape()
    pictures: bool | None = None
    """The value model sees the pictures of prompts, by the frozen tower and projector of MODEL; by
    default where the rollouts have any. --no-pictures: MODEL's text part alone is taken, to which
    they are blanks."""
    start: Path | None = None
    """Checkpoint to go on from: its backbone with its adapter, as that is shaped, its head or
    heads, gamma and layers. MODEL is then where its base model lies."""
    attention: Attention = "sdpa"
    """What computes it: sdpa, with a dense mask of each pack; flex or flash, without one, on a
    GPU."""
    quantize: Quantize | None = None
    """Hold the weights that do not train in 4 bits (QLoRA), by bitsandbytes."""

    def check(self) -> None:
        """Raises ValueError naming the option that is wrong."""
        check_choice("tune", self.tune, WEIGHTS)
        check_attention(self.attention)
        check_quantize(self.quantize, self.tune)
        check_positive(**{"lora.rank": self.lora.rank, "lora.alpha": self.lora.alpha})
        (depth, _), layers = load_shape(self.model), self.num_layers
        fits = layers is None or 1 <= layers <= depth
        check(fits, "num_layers", layers, f"1 to {depth}, as {self.model} has")
        if start := self.started():
            same = layers in (None, start.num_layers)
            check(same, "num_layers", layers, f"{start.num_layers}, as {self.start} has")
            adapts = self.tune != "lora" or start.weights != "full"
            check(adapts, "tune", self.tune, f"full or head, {self.start} is a full backbone")
            known = self.tokenizer().fingerprint == start.tokenizer_fingerprint
            check(known, "model", self.model, f"one with the tokenizer that {self.start} learnt")

    def sees(self, pictured: bool) -> bool:
        """Whether the value model is to see pictures. pictured: whether a text has one.

        Raises ValueError where MODEL cannot, or where what it goes on from does otherwise.
        """
        start = self.started()
        by_default = pictured or (start is not None and start.pictures)
        wanted = by_default if self.pictures is None else self.pictures
        if start:
            known = f"{start.pictures} (--{'no-' * (not start.pictures)}pictures), as {self.start}"
            check(wanted == start.pictures, "pictures", wanted, known)
        if wanted:
            rule = "{} with pictures, with which others were not tried"
            check(self.attention == "sdpa", "attention", self.attention, rule.format("sdpa"))
            check(self.quantize is None, "quantize", self.quantize, rule.format("left out"))
            try:
                check_family(load_config(self.model, text=False).model_type)
            except ValueError as error:
                raise ValueError(f"pictures: {error}; --no-pictures takes text alone") from error
        return wanted

    def started(self) -> LenvmConfig | None:
        """Of the checkpoint to go on from. Raises CheckpointError."""
        return read_config(self.start) if self.start else None

    def name(self) -> str:
        """What the checkpoint will call its base model."""
        start = self.started()
        return self.base_model or (start.base_model if start else self.model)

    def states(self) -> str | None:
        """The kind of its layers that carry states through a row of texts, if it has any."""
        config = load_config(self.model)
        kinds = [*(getattr(config, "layer_types", None) or [])][: self.depth()]
        others = sorted({*kinds} - PACKED)
        return ", ".join(others) or (config.model_type if config.model_type in RECURRENT else None)

    def tokenizer(self) -> TokenizerOf:
        """MODEL's."""
        return TokenizerOf.load(self.model)

    def depth(self) -> int:
        """Layers that the value model has."""
        start = self.started()
        return self.num_layers or (start.num_layers if start else load_shape(self.model)[0])

    def weights(self) -> str:
        """What of the backbone the checkpoint holds, as LenvmConfig says it."""
        start = self.started()
        goes_on = self.tune != "full" and start is not None and start.weights != "head"
        return start.weights if start and goes_on else WEIGHTS[self.tune]

    def build(self, config: LenvmConfig, dtype: torch.dtype) -> ValueModel:
        """The value model before any step; dtype: of frozen weights, those that train are in
        float32. Raises CheckpointError where that to go on from does not load."""
        frozen = self.tune != "full"
        start = self.started()
        source = str(self.start) if start and start.weights == "full" else self.model
        backbone = load_backbone(
            source,
            config.num_layers,
            dtype if frozen else torch.float32,
            ATTENTION[self.attention],
            sees=config.pictures,
            quantization_config=quantization(self.quantize, dtype),
        )
        if frozen:
            backbone.requires_grad_(False)
        if start and start.weights == "adapter":
            backbone = self._with_adapter(backbone)
        elif self.tune == "lora":
            from peft import LoraConfig, get_peft_model

            rank, alpha = self.lora.rank, self.lora.alpha
            shape = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")
            backbone = get_peft_model(backbone, shape)
        head = ValueHead(backbone.config.hidden_size)
        sight = read_sight(self.start, config, self.model, dtype)
        model = ValueModel(backbone, head, config, sight)
        same = start is not None and start.lookahead_rank == config.lookahead_rank
        if self.start:
            model.load_heads(self.start, lookahead=same)
        if not same:
            as_value_head(model)
        return model

    def _with_adapter(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """With that of the checkpoint to go on from; part of the weights where all train."""
        assert self.start
        adapted = load_adapter(backbone, self.start, trains=self.tune == "lora")
        if self.tune != "full":
            return adapted
        return adapted.merge_and_unload().requires_grad_(True)  # peft froze it


@torch.no_grad()
def check_causal(model: ValueModel, name: str) -> None:
    """Raises ValueError where states see later tokens, as an encoder's do: there it would be
    learnt from what is still to come. name: of the backbone."""
    place = next(model.backbone.parameters()).device
    texts = (torch.tensor([[0, last]], device=place) for last in (1, 2))
    state, other = (model.hidden(text)[0, 0].float() for text in texts)
    same = torch.linalg.norm(state - other) < SAME * torch.linalg.norm(state)
    check(bool(same), "model", name, "a decoder, whose tokens do not see later ones")


@torch.no_grad()
def as_value_head(model: ValueModel) -> None:
    """Let the lookahead head, if any, begin as the value head: all next tokens change nothing."""
    if (lookahead := model.lookahead) is not None:
        lookahead.fc.load_state_dict(model.head.fc.state_dict())
        own, values = lookahead.queries, model.head.summary
        for ours, theirs in ((own.weight, values.weight), (own.bias, values.bias)):
            ours.zero_()[0] = theirs[0]


def load_config(model: str, text: bool = True) -> PreTrainedConfig:
    """Of a backbone's decoder, or of the whole. Raises ValueError if there is none."""
    try:
        config = AutoConfig.from_pretrained(model)
        return config.get_text_config() if text else config
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {model!r} does not load: {error}") from error


def load_shape(model: str) -> tuple[int, int]:
    """(layers, vocabulary size) of a backbone. Raises ValueError if there is none."""
    config = load_config(model)
    return config.num_hidden_layers, config.vocab_size
