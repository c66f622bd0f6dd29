"""The value model: a decoder without its vocabulary head, and a two-layer head on every position.

Legend: B rows, T tokens, H hidden size, K next tokens. The output at a token is the value of the
state after that token, as logit z (see contract.values). With a lookahead head (lookahead.py) the
model also tells z after any next token, without reading that token.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from value_server.contract.checkpoint import (
    CONFIG_FILE,
    CONFIG_KEY,
    HEAD_FILE,
    LOOKAHEAD_FILE,
    PROCESSOR_FILE,
    LenvmConfig,
    make_readable,
    read_config,
)
from value_server.contract.targets import Readout
from value_server.contract.weights import weights_fingerprint
from value_server.model.backbone import load_adapter, load_backbone, load_sight, naming
from value_server.model.inputs import Pictures, decoder_inputs, with_axes
from value_server.model.lookahead import Lookahead, logits_after
from value_server.model.sight import Sight

log = logging.getLogger(__name__)


class ValueHead(nn.Module):
    """raw = summary(SiLU(fc(h))), always in float32; z is raw unless `readout` says otherwise."""

    readout: Readout | None = None

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc = nn.Linear(hidden_size, hidden_size, dtype=torch.float32)
        self.summary = nn.Linear(hidden_size, 1, dtype=torch.float32)

    def forward(self, hidden: Tensor, raw: bool = False) -> Tensor:
        """(..., H) of any dtype → (...) float32 logits z; with `raw` what the loss is made of."""
        with torch.autocast(hidden.device.type, enabled=False):
            out: Tensor = self.summary(nn.functional.silu(self.fc(hidden.float())))
            out = out.squeeze(-1)
            return out if raw or self.readout is None else self.readout.logit(out)


class ValueModel(nn.Module):
    """backbone: a transformers decoder, or the peft model around it while an adapter trains.

    lookahead: None where `lenvm.lookahead_rank` is 0. sight: None unless `lenvm.pictures`; the
    backbone then is the decoder that it was made with.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        head: ValueHead,
        lenvm: LenvmConfig,
        sight: Sight | None = None,
    ) -> None:
        super().__init__()
        self.sight = sight
        self.backbone = backbone
        self.head = head
        self.head.readout = lenvm.readout
        self.lenvm = lenvm
        self.lookahead: Lookahead | None = None
        if lenvm.lookahead_rank:
            self.lookahead = Lookahead(backbone.config.hidden_size, lenvm.lookahead_rank)

    @property
    def config(self) -> Any:
        """The backbone's transformers config."""
        return self.backbone.config

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        raw: bool = False,
        after: Sequence[tuple[Tensor, Tensor]] = (),
        pictures: Pictures | None = None,
    ) -> Any:
        """(B, T) ids → (B, T) float32 logits z, or with `raw` the head's raw output.

        Positions that restart at 0 mark packed texts. after: pairs of (N,) positions, counted
        through all B·T, and (N, K) next tokens there; with them the result is z and the list of
        their `following`. pictures: of these texts, for a model that sees them.
        """
        hidden = self.hidden(input_ids, position_ids, attention_mask, pictures)
        z: Tensor = self.head(hidden, raw)
        if not after:
            return z
        rows = hidden.flatten(0, 1)
        return z, [self.following(rows[places], next_ids) for places, next_ids in after]

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pictures: Pictures | None = None,
    ) -> Tensor:
        """(B, T) ids → (B, T, H) states that both heads read. Raises ValueError, see inputs."""
        given: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
        if pictures is not None:
            if self.sight is None:
                raise ValueError("pictures: given to a value model that sees none")
            parts = (input_ids, position_ids, pictures)
            given = decoder_inputs(self.backbone, self.sight, *parts)
        elif self.sight is not None and self.sight.axes > 1:
            given["position_ids"] = with_axes(input_ids, position_ids, None)
        output = self.backbone(**{"attention_mask": attention_mask} | given, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states

    def following(self, hidden: Tensor, next_ids: Tensor) -> Tensor:
        """(..., H) states and (..., K) next tokens → (..., K) float32 logits z after them.

        By the lookahead head; RuntimeError without one.
        """
        if self.lookahead is None:
            raise RuntimeError("lookahead_rank: 0, this value model has no lookahead head")
        distinct, places = next_ids.unique(return_inverse=True)
        keys = self.lookahead.keys(self.backbone.get_input_embeddings()(distinct))
        with torch.autocast(hidden.device.type, enabled=False):
            return logits_after(self.lookahead(hidden), nn.functional.embedding(places, keys))

    def save(self, folder: Path) -> None:
        """Write config, head, and whatever of the backbone `lenvm.weights` says: safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("adapter_*"):  # transformers would apply it to a full backbone
            stale.unlink()
        if self.lenvm.weights == "adapter":
            # Else peft would note the path of the training machine.
            self.backbone.active_peft_config.base_model_name_or_path = self.lenvm.base_model
            # "auto" would ask the hub about the base model.
            self.backbone.save_pretrained(folder, save_embedding_layers=False)
        elif self.lenvm.weights == "full":
            self.backbone.save_pretrained(folder)
        (folder / LOOKAHEAD_FILE).unlink(missing_ok=True)
        for part, file in ((self.head, HEAD_FILE), (self.lookahead, LOOKAHEAD_FILE)):
            if part is not None:
                tensors = {n: t.detach().cpu().contiguous() for n, t in part.state_dict().items()}
                save_file(tensors, folder / file)
        if self.sight is not None:
            self.sight.processor.save_pretrained(folder)
        facts = self.config.to_dict() | {CONFIG_KEY: msgspec.to_builtins(self.lenvm)}
        # A path of the training machine is of no use to the reader.
        facts.pop("_name_or_path", None)
        (folder / CONFIG_FILE).write_text(json.dumps(facts, indent=2, default=str) + "\n")
        make_readable(folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card

    def load_heads(self, checkpoint: Path, lookahead: bool = True) -> None:
        """Read the value head of a checkpoint; with `lookahead` the other, too, if this has one.

        Raises CheckpointError.
        """
        with naming(checkpoint):
            self.head.load_state_dict(load_file(checkpoint / HEAD_FILE))
            if self.lookahead is not None and lookahead:
                self.lookahead.load_state_dict(load_file(checkpoint / LOOKAHEAD_FILE))

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        base_model: str | None = None,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str = "sdpa",
    ) -> "ValueModel":
        """Read a checkpoint; `base_model` overrides where its backbone lies.

        An adapter is merged in float32 before the cast to `dtype`. Raises CheckpointError that
        names what is missing or does not fit.
        """
        lenvm = read_config(checkpoint)
        base = base_model or lenvm.base_model
        merging = lenvm.weights == "adapter"
        backbone = load_backbone(
            str(checkpoint) if lenvm.weights == "full" else base,
            lenvm.num_layers,
            torch.float32 if merging else dtype,
            attn_implementation,
            lenvm.pictures,
        )
        if merging:
            backbone = load_adapter(backbone, checkpoint).merge_and_unload()
        head = ValueHead(backbone.config.hidden_size)
        sight = read_sight(checkpoint, lenvm, base, dtype)
        model = cls(backbone.to(dtype), head, lenvm, sight)
        model.load_heads(checkpoint)
        ours = lenvm.base_fingerprint if lenvm.weights != "full" or lenvm.pictures else ""
        theirs = weights_fingerprint(base) if ours else ""
        if theirs and theirs != ours:
            log.warning("%s: was trained on other weights than those of %s", checkpoint, base)
        return model.eval()


def read_sight(
    checkpoint: Path | None, lenvm: LenvmConfig, base: str, dtype: torch.dtype
) -> Sight | None:
    """What a value model sees by: tower and projector of `base`, the image processor of its
    checkpoint where that has one. Raises CheckpointError."""
    if not lenvm.pictures:
        return None
    own = checkpoint if checkpoint and (checkpoint / PROCESSOR_FILE).exists() else None
    return load_sight(base, lenvm.num_layers, dtype, own)


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively; elsewhere float32 is faster."""
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return torch.bfloat16
