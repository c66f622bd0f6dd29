"""Checkpoints of the paper's own implementation, to ours and back: no weight changes by a bit.

    theirs                                      ours
    model.layers.0…, model.norm…                layers.0…, norm…
    model.language_model.layers.0… (newer VL)   layers.0…
    lm_head.weight, where embeddings are tied   embed_tokens.weight
    visual.*, model.visual.* (VL)               - (text only)
    v_head.fc.*, v_head.summary.*               fc.*, summary.* in value_head.safetensors

They store no gamma, and the head in value_head.safetensors or among the main shards. They have no
lookahead head: an export leaves ours out.
Legend: H hidden size.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trainer.checks import check_choice
from value_server.contract.checkpoint import (
    CONFIG_FILE,
    CONFIG_KEY,
    HEAD_FILE,
    LOOKAHEAD_FILE,
    LenvmConfig,
    make_readable,
    read_config,
    tokenizer_fingerprint,
)
from value_server.contract.values import check_gamma
from value_server.model.text_part import text_config
from value_server.model.value_model import ValueModel

HeadKind = Literal["mlp", "linear"]
HEAD_PREFIX = "v_head."
HEAD_NAMES = ("fc.weight", "fc.bias", "summary.weight", "summary.bias")
DECODER_PREFIXES = ("model.language_model.", "model.")
VISION_PREFIXES = ("visual.", "model.visual.")
EMBEDDINGS, VOCABULARY_HEAD = "embed_tokens.weight", "lm_head.weight"


def import_checkpoint(
    source: Path,
    output: Path,
    *,
    base_model: str,
    gamma: float | None = None,
    head: HeadKind | None = None,
) -> None:
    """Turn SOURCE, a checkpoint of the paper's implementation, into one of ours in OUTPUT.

    Parameters
    ----------
    source
        Folder with config.json and safetensors files.
    output
        Folder to write, empty or new.
    base_model
        Hub name of the model that SOURCE was initialised from.
    gamma
        Discount that SOURCE was trained with: it does not tell.
    head
        How the head is read: with its hidden layer, or without, as the VL training forward does;
        needed only for a VL checkpoint whose head has one.
    """
    if gamma is None:
        raise ValueError(
            f"gamma: {source} does not tell the discount that it was trained with; "
            "give it (0.997 for the released Qwen2.5 models)"
        )
    if head is not None:
        check_choice("head", head, get_args(HeadKind))
    _check_empty(output)
    theirs = _load_config(source)
    config = text_config(theirs)
    tensors = dict(_read_tensors(source))
    head_tensors = _take_head(tensors, config.hidden_size, source)
    if head is None:
        vision = any(name.startswith(VISION_PREFIXES) for name in tensors) or config is not theirs
        if vision and "fc.weight" in head_tensors:
            raise ValueError(
                f"head: {source} is a vision-language checkpoint whose head has a hidden layer "
                "that its training may have passed by; say 'mlp' or 'linear'"
            )
        head = "mlp" if "fc.weight" in head_tensors else "linear"
    decoder = _decoder(tensors, config, source)
    tokenizer = _tokenizer(source, base_model)
    lenvm = LenvmConfig(
        gamma=check_gamma(gamma),
        base_model=base_model,
        weights="full",
        num_layers=config.num_hidden_layers,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        training={"imported": source.name},
    )
    output.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(decoder, output)
    save_file(linear_as_mlp(head_tensors) if head == "linear" else head_tensors, output / HEAD_FILE)
    _write_config(config.to_dict() | {CONFIG_KEY: msgspec.to_builtins(lenvm)}, output)
    tokenizer.save_pretrained(output)


def export_checkpoint(checkpoint: Path, output: Path, *, base_model: str | None = None) -> None:
    """Turn CHECKPOINT into the layout of the paper's implementation, in OUTPUT.

    It takes gamma as an argument of each request: the last line printed tells which. It has no
    lookahead head: that of CHECKPOINT is left out, and a line printed says so.

    Parameters
    ----------
    checkpoint
        Folder that `lenvm train` or `lenvm import` wrote; an adapter is merged.
    output
        Folder to write, empty or new.
    base_model
        Where the backbone lies, if not where the checkpoint says.
    """
    _check_empty(output)
    lenvm = read_config(checkpoint)
    if lenvm.target != "discounted_return":
        raise ValueError(f"target: {lenvm.target!r}, must be 'discounted_return' to be exported")
    if lenvm.pictures:
        raise ValueError("pictures: True, must be False to be exported, as text alone")
    if lenvm.weights == "full":
        config, decoder = AutoConfig.from_pretrained(checkpoint), dict(_read_tensors(checkpoint))
        decoder = {name: t for name, t in decoder.items() if name not in HEAD_NAMES}
    else:
        model = ValueModel.load(checkpoint, base_model)
        config, decoder = model.config, model.backbone.state_dict()
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"model_type: {config.model_type!r} has no causal language model")
    facts = config.to_dict()
    facts.pop(CONFIG_KEY, None)
    facts["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    facts["tie_word_embeddings"] = True  # no vocabulary head is there to load
    output.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict({f"model.{name}": t for name, t in decoder.items()}, output)
    head = load_file(checkpoint / HEAD_FILE)
    save_file({HEAD_PREFIX + name: t for name, t in head.items()}, output / HEAD_FILE)
    _write_config(facts, output)
    _tokenizer(checkpoint, base_model or lenvm.base_model).save_pretrained(output)
    if lenvm.lookahead_rank:
        print(f"{output} has no lookahead head: this layout knows none")
    print(f"gamma {lenvm.gamma}")


def linear_as_mlp(head: dict[str, Tensor]) -> dict[str, Tensor]:
    """summary.* of z = w·h + b as the same function with a hidden layer: a = SiLU(a) - SiLU(-a)."""
    weight, bias = head["summary.weight"], head["summary.bias"]  # (1, H), (1,)
    fc, summary = weight.new_zeros(weight.shape[1], weight.shape[1]), torch.zeros_like(weight)
    fc[0], fc[1] = weight[0], -weight[0]
    summary[0, 0], summary[0, 1] = 1, -1
    return {
        "fc.weight": fc,
        "fc.bias": torch.zeros_like(weight[0]),
        "summary.weight": summary,
        "summary.bias": bias,
    }


def _read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All (name, tensor) of a folder's safetensors files, without a lookahead head's."""
    files = sorted(file for file in folder.glob("*.safetensors") if file.name != LOOKAHEAD_FILE)
    if not any(file.name != HEAD_FILE for file in files):
        raise ValueError(f"{folder}: no backbone in safetensors files; pickled ones are not read")
    for file in files:
        try:
            yield from load_file(file).items()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: {error}") from error


def _take_head(tensors: dict[str, Tensor], hidden_size: int, source: Path) -> dict[str, Tensor]:
    """The head's tensors without their prefix, removed from `tensors`; fc.* may be missing."""
    head = {
        name.removeprefix(HEAD_PREFIX): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(HEAD_PREFIX)
    }
    needed = HEAD_NAMES if any(name.startswith("fc.") for name in head) else HEAD_NAMES[2:]
    for name in needed:
        if name not in head:
            raise ValueError(
                f"{source}: no {HEAD_PREFIX}{name} in its safetensors files; pickled ones are "
                "not read"
            )
    rows = {"fc.weight": (hidden_size, hidden_size), "fc.bias": (hidden_size,)}
    shapes = rows | {"summary.weight": (1, hidden_size), "summary.bias": (1,)}
    for name, tensor in head.items():
        if tuple(tensor.shape) != shapes.get(name):
            raise ValueError(
                f"{source}: {HEAD_PREFIX}{name} is {tuple(tensor.shape)}, not {shapes.get(name)}"
            )
    return head


def _decoder(
    tensors: dict[str, Tensor], config: PreTrainedConfig, source: Path
) -> dict[str, Tensor]:
    """The decoder's tensors under our names: all of them, and no others."""
    vocabulary_head = tensors.pop(VOCABULARY_HEAD, None)
    decoder = {_our_name(n): t for n, t in tensors.items() if not n.startswith(VISION_PREFIXES)}
    if EMBEDDINGS not in decoder and config.tie_word_embeddings and vocabulary_head is not None:
        decoder[EMBEDDINGS] = vocabulary_head
    with torch.device("meta"):
        expected = AutoModel.from_config(config).state_dict()
    for name in expected | decoder:
        if name not in decoder or name not in expected:
            state = "is missing" if name not in decoder else "is not known"
            raise ValueError(f"{source}: weight {name!r} {state} in a {config.model_type} decoder")
        if decoder[name].shape != expected[name].shape:
            raise ValueError(
                f"{source}: weight {name!r} is {tuple(decoder[name].shape)}, config.json says "
                f"{tuple(expected[name].shape)}"
            )
    return decoder


def _our_name(name: str) -> str:
    for prefix in DECODER_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _load_config(source: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: config.json does not load: {error}") from error


def _tokenizer(folder: Path, base_model: str) -> PreTrainedTokenizerBase:
    for place in (str(folder), base_model):
        try:
            return AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError) as error:
            reason = error
    raise ValueError(f"base_model: no tokenizer in {folder} or {base_model!r}: {reason}")


def _write_config(facts: dict[str, Any], folder: Path) -> None:
    facts.pop("_name_or_path", None)  # a path of this machine
    (folder / CONFIG_FILE).write_text(json.dumps(facts, indent=2, default=str) + "\n")
    make_readable(folder)


def _check_empty(output: Path) -> None:
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output: {output} is not empty")
