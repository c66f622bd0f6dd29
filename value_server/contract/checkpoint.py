"""What a checkpoint holds. ValueModel.save and .load (model/value_model.py) write and read it.

config.json                    the backbone's config with the block `lenvm`, a LenvmConfig
value_head.safetensors         the head
lookahead.safetensors          the lookahead head, where `lookahead_rank` is not 0
model*.safetensors             the backbone, where `weights` is "full"
adapter_*                      the peft adapter, where it is "adapter"
preprocessor_config.json       its image processor, where `pictures` is true
tokenizer.json and the like    where it brings its own; else the base model's is taken
"""

import hashlib
import json
import math
import stat
from pathlib import Path
from typing import Any, Protocol

import msgspec

from value_server.contract.targets import Readout, Target
from value_server.contract.values import check_gamma

CONFIG_FILE = "config.json"
CONFIG_KEY = "lenvm"
HEAD_FILE = "value_head.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
LOOKAHEAD_FILE = "lookahead.safetensors"
PROCESSOR_FILE = "preprocessor_config.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; names the file or field."""


class LenvmConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Facts of a value model that its weights do not tell.

    gamma: discount of the value, in (0, 1).
    target, target_scale: how the head's raw output reads, see targets.
    base_model: hub name or path of the backbone that the checkpoint builds on.
    weights: "full" (the backbone is in the checkpoint), "adapter" (a peft adapter on the base
        model) or "head" (the base model as it is).
    num_layers: layers of the base model that are used, from the bottom.
    tokenizer_fingerprint: of the tokenizer trained with.
    base_fingerprint: of the base model's weights that were trained on (weights.py); empty where
        it is not known.
    lookahead_rank: r of the lookahead head (model/lookahead.py); 0: there is none.
    pictures: whether it sees the pictures of a prompt, by tower and projector of the base model
        (model/sight.py); else their placeholder tokens are blanks to it.
    training: free facts (data, command, figures).
    """

    gamma: float
    base_model: str
    weights: str
    num_layers: int
    tokenizer_fingerprint: str
    target: Target = "discounted_return"
    target_scale: float = 1.0
    base_fingerprint: str = ""
    lookahead_rank: int = 0
    pictures: bool = False
    training: dict[str, Any] = {}

    def __post_init__(self) -> None:
        check_gamma(self.gamma)
        if not 0 < self.target_scale < math.inf:
            raise ValueError(f"target_scale: {self.target_scale!r}, must be above 0")
        if self.weights not in ("full", "adapter", "head"):
            raise ValueError(f"weights: unknown value {self.weights!r}")
        if self.lookahead_rank < 0:
            raise ValueError(f"lookahead_rank: {self.lookahead_rank}, must be at least 0")
        if self.lookahead_rank and self.target != "discounted_return":
            # Its output is a logit: that of the other targets is computed from a length.
            raise ValueError(
                f"lookahead_rank: {self.lookahead_rank}, must be 0 with target {self.target}"
            )

    @property
    def readout(self) -> Readout:
        """How the head's raw output becomes a value."""
        return Readout(self.target, self.gamma, self.target_scale)


def read_config(checkpoint: Path) -> LenvmConfig:
    """The `lenvm` block of `checkpoint`/config.json. Raises CheckpointError."""
    path = checkpoint / CONFIG_FILE
    try:
        block = json.loads(path.read_text())[CONFIG_KEY]
        return msgspec.convert(block, LenvmConfig)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no {CONFIG_KEY!r} block: not a LenVM checkpoint") from error
    except ValueError as error:  # JSON and msgspec errors, gamma out of range
        raise CheckpointError(f"{path}: {error}") from error


def make_readable(folder: Path) -> None:
    """Whoever may read `folder`/config.json may read the weights beside it.

    safetensors writes files that nobody but their owner can read, and servers run as other users.
    """
    mode = stat.S_IMODE((folder / CONFIG_FILE).stat().st_mode)
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def tokenizer_source(checkpoint: Path, base_model: str) -> str:
    """Hub name or folder of its tokenizer: the checkpoint itself, if it brings one."""
    names = ("tokenizer.json", "tokenizer_config.json")
    own = any((checkpoint / name).exists() for name in names)
    return str(checkpoint) if own else base_model


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that the fingerprint needs."""

    def get_vocab(self) -> dict[str, int]: ...


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 over all (id, token) pairs, added tokens included: equal ids mean equal text."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\t{token}\n".encode())
    return digest.hexdigest()
