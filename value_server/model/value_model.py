"""The value model: a decoder without its vocabulary head, and a two-layer head on every position.

Legend: B rows, T tokens, H hidden size, K next tokens. The output at a token is the value of the
state after that token, as logit z (see contract.values). With a lookahead head (lookahead.py) the
model also tells z after any next token, without reading that token.
"""

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import get_logger

from value_server.contract.checkpoint import (
    CONFIG_FILE,
    CONFIG_KEY,
    HEAD_FILE,
    LOOKAHEAD_FILE,
    CheckpointError,
    LenvmConfig,
    make_readable,
    read_config,
)
from value_server.contract.targets import Readout
from value_server.contract.weights import are_other_weights, weights_fingerprint
from value_server.model.lookahead import Lookahead, logits_after
from value_server.model.sight import Sight
from value_server.model.text_part import text_part

log = logging.getLogger(__name__)

VOCABULARY_HEAD = "lm_head."
# What transformers, peft and safetensors raise, or warn of, where files do not fit.
UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, SafetensorError, UserWarning)


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

    lookahead: None where `lenvm.lookahead_rank` is 0.
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
    ) -> Any:
        """(B, T) ids → (B, T) float32 logits z, or with `raw` the head's raw output.

        Positions that restart at 0 mark packed texts. after: pairs of (N,) positions, counted
        through all B·T, and (N, K) next tokens there; with them the result is z and the list of
        their `following`.
        """
        hidden = self.hidden(input_ids, position_ids, attention_mask)
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
    ) -> Tensor:
        """(B, T) ids → (B, T, H) states that both heads read."""
        output = self.backbone(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=False,
        )
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
        with _naming(checkpoint):
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
        source = str(checkpoint) if lenvm.weights == "full" else base_model or lenvm.base_model
        merging = lenvm.weights == "adapter"
        backbone = load_backbone(
            source,
            lenvm.num_layers,
            torch.float32 if merging else dtype,
            attn_implementation,
        )
        if merging:
            backbone = load_adapter(backbone, checkpoint).merge_and_unload()
        model = cls(backbone.to(dtype), ValueHead(backbone.config.hidden_size), lenvm)
        model.load_heads(checkpoint)
        if lenvm.weights != "full" and are_other_weights(
            lenvm.base_fingerprint, weights_fingerprint(source)
        ):
            log.warning("%s: was trained on other weights than those of %s", checkpoint, source)
        return model.eval()


@contextlib.contextmanager
def _naming(checkpoint: Path) -> Iterator[None]:
    """What does not fit is a CheckpointError that names the folder."""
    try:
        yield
    except UNREADABLE as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error


def load_adapter(backbone: PreTrainedModel, checkpoint: Path, trains: bool = False) -> Any:
    """The peft model of `backbone` with a checkpoint's adapter. Raises CheckpointError."""
    from peft import PeftModel

    with _naming(checkpoint), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(backbone, checkpoint, is_trainable=trains)


def load_backbone(
    source: str,
    num_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """The first `num_layers` layers (None: all) of a decoder and its norm, no vocabulary head.

    source: hub name or folder; of a vision-language model the text part is taken. Raises
    CheckpointError.
    """
    try:
        config = AutoConfig.from_pretrained(source)
        if num_layers is not None:
            _truncate(config.get_text_config(), num_layers)
        with _without_report():
            backbone, report = AutoModel.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # _check tells them by name
                output_loading_info=True,
            )
        _check(report, source, num_layers)
        return text_part(backbone)
    except UNREADABLE as error:
        raise CheckpointError(f"{source}: backbone does not load: {error}") from error


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """transformers would print a page of the weights that a truncated backbone leaves out."""
    logger = get_logger("transformers.modeling_utils")
    logger.addFilter(_is_no_report)  # not its level, from which other messages hang
    try:
        yield
    finally:
        logger.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _check(report: dict[str, Any], source: str, num_layers: int | None) -> None:
    """Raises ValueError where transformers would go on with random weights."""
    if report["missing_keys"]:
        raise ValueError(f"weights are missing: {min(report['missing_keys'])}")
    for name, there, here in sorted(report["mismatched_keys"]):
        raise ValueError(f"{name} is {tuple(there)}, its config.json says {tuple(here)}")
    unused = [name for name in report["unexpected_keys"] if not _is_left_out(name, num_layers)]
    if unused:
        log.warning("%s: %d weights are not used, such as %s", source, len(unused), min(unused))


def _is_left_out(name: str, num_layers: int | None) -> bool:
    """Whether a weight is of a layer above the last, or of the vocabulary head."""
    layer = re.search(r"\.(\d+)\.", name)
    above = layer is not None and num_layers is not None and int(layer[1]) >= num_layers
    return above or name.startswith(VOCABULARY_HEAD)


def _truncate(config: PreTrainedConfig, num_layers: int) -> None:
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise ValueError(f"num_layers: {num_layers} of {config.num_hidden_layers}")
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively; elsewhere float32 is faster."""
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return torch.bfloat16
