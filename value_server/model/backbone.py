"""Backbones as they are read: as deep as asked for, and named where they do not fit."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import get_logger

from value_server.contract.checkpoint import ADAPTER_FILE, CheckpointError
from value_server.model.sight import Sight, check_family
from value_server.model.text_part import text_part

log = logging.getLogger(__name__)

VOCABULARY_HEAD = "lm_head."
# What transformers, peft and safetensors raise, or warn of, where files do not fit.
UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, SafetensorError, UserWarning)


@contextlib.contextmanager
def naming(checkpoint: Path) -> Iterator[None]:
    """What does not fit is a CheckpointError that names the folder."""
    try:
        yield
    except UNREADABLE as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error


def load_adapter(backbone: PreTrainedModel, checkpoint: Path, trains: bool = False) -> Any:
    """The peft model of `backbone` with a checkpoint's adapter. Raises CheckpointError."""
    from peft import PeftModel

    if not (checkpoint / ADAPTER_FILE).exists():  # peft would read a pickle in its place
        raise CheckpointError(f"{checkpoint}: no {ADAPTER_FILE}")
    with naming(checkpoint), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(backbone, checkpoint, is_trainable=trains)


def load_backbone(
    source: str,
    num_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    sees: bool = False,
    quantization_config: Any = None,
) -> PreTrainedModel:
    """The first `num_layers` layers (None: all) of a decoder and its norm, no vocabulary head.

    source: hub name or folder; of a vision-language model the text part is taken, and with `sees`
    the decoder as it is, for pictures. quantization_config: transformers' own. Raises
    CheckpointError.
    """
    with _loading(source, "backbone"):
        whole = _load(source, num_layers, dtype, attn_implementation, quantization_config)
        return whole.get_decoder() if sees else text_part(whole)


def load_sight(
    source: str,
    num_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    processor: Path | None = None,
) -> Sight:
    """What sees of a vision-language model, for a decoder of `num_layers` layers.

    processor: folder with another image processor than that of `source`. Raises CheckpointError.
    """
    with _loading(source, "pictures"):
        check_family(AutoConfig.from_pretrained(source).model_type)
        whole = _load(source, 1, dtype)  # its decoder goes
        return Sight(whole, str(processor or source), num_layers)


def _load(
    source: str,
    num_layers: int | None,
    dtype: torch.dtype,
    attn_implementation: str = "sdpa",
    quantization_config: Any = None,
) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(source)
    if num_layers is not None:
        _truncate(config.get_text_config(), num_layers)
    with _without_report():
        whole, report = AutoModel.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # _check tells them by name
            output_loading_info=True,
        )
    _check(report, source, num_layers)
    return whole


@contextlib.contextmanager
def _loading(source: str, what: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise CheckpointError(f"{source}: {what} does not load: {error}") from error


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
