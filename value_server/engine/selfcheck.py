"""Whether the engine gives what plain transformers gives, asked of every backbone at its start.

Some backbones run in the engine without an error and give wrong scores: attention that does not
go through transformers' attention interface, that looks ahead, that works on chunks, or is none.
So one short text is computed twice, plainly before the engine changes the backbone, and in two
passes after it, and the hidden states are compared:

    text     [ 0 .................. FIRST ) [ FIRST .... TEXT ) candidates
    engine     pass 1                         pass 2 ──────────────────────
    plain      one pass, causal, no cache; a row for each candidate

The text is shorter than a sliding window. That windows are kept to is seen from what the
attention is told.

Legend: H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from value_server.contract.checkpoint import CheckpointError
from value_server.engine.job import Job, Row
from value_server.model.value_model import ValueModel

if TYPE_CHECKING:
    from value_server.engine.engine import Engine

TEXT, FIRST = 24, 16
CANDIDATES = (0, 1)
LAYER_TYPES = {"full_attention", "sliding_attention"}


def text(model: ValueModel) -> list[int]:
    """The ids of the text, none of which stands for a picture."""
    vocab_size = model.backbone.get_input_embeddings().weight.shape[0]
    picture = model.sight.placeholder if model.sight else -1
    ids = [(7919 * i + 17) % vocab_size for i in range(TEXT + 1)]
    return [token for token in ids if token != picture][:TEXT]


@contextmanager
def named(model: ValueModel) -> Iterator[None]:
    """Whatever fails inside is a CheckpointError with the name of the backbone."""
    name = f"architecture {type(model.backbone).__name__} ({model.config.model_type})"
    try:
        yield
    except Exception as error:  # models of a hundred authors raise what they like
        raise CheckpointError(f"{name}: {error}") from error


@torch.inference_mode()
def plain(model: ValueModel) -> Tensor:
    """(TEXT + candidates, H) hidden states, by transformers' own attention."""
    kinds = set(getattr(model.config, "layer_types", None) or LAYER_TYPES)
    if not kinds <= LAYER_TYPES:
        raise ValueError(f"layers of type {', '.join(sorted(kinds - LAYER_TYPES))}")
    backbone = model.backbone
    backbone.set_attn_implementation("eager")  # the one that leaves nothing out
    ids = text(model)
    rows = torch.tensor([[*ids, c] for c in CANDIDATES], device=backbone.device)
    hidden: Tensor = backbone(input_ids=rows, use_cache=False).last_hidden_state
    return torch.cat([hidden[0, :TEXT], hidden[:, TEXT]]).float()  # (2, TEXT + 1, H)


def check(engine: "Engine", session: str, expected: Tensor, windows: dict[int, int | None]) -> None:
    """Raises ValueError unless the engine gives what `plain` returned. windows: see `compare`."""
    ids = text(engine.model)
    hidden: list[Tensor] = []
    graphs, engine.graphs = engine.graphs, False  # a graph calls no hook
    hook = engine.model.head.register_forward_pre_hook(lambda _, given: hidden.append(given[0]))
    try:
        engine.run(Job([Row(session, 0, ids[:FIRST])]))
        engine.run(Job([Row(session, FIRST, ids[FIRST:], CANDIDATES[: engine.max_candidates])]))
    finally:
        hook.remove()
        engine.graphs = graphs
    compare(engine.model, expected, torch.cat(hidden), windows)


def compare(
    model: ValueModel, expected: Tensor, found: Tensor, windows: dict[int, int | None]
) -> None:
    """Raises ValueError unless the engine gave what `plain` returned.

    found: (n, H) hidden states, in the order of `expected`, perhaps without the last ones.
    windows: layer → window that its attention was told.
    """
    config = model.config
    if len(windows) != config.num_hidden_layers:
        raise ValueError(
            f"{len(windows)} of {config.num_hidden_layers} layers use the attention "
            "interface of transformers"
        )
    told = sum(window is not None for window in windows.values())
    if told < _windowed_layers(config):
        raise ValueError("its attention is not told its sliding window")
    worst, limit = off_by(model, expected[: len(found)], found)  # perhaps one candidate only
    if not worst <= limit:
        raise ValueError(
            f"its hidden states differ from plain transformers by {worst:.1%}, "
            f"more than {limit:.1%}"
        )


def off_by(model: ValueModel, expected: Tensor, found: Tensor) -> tuple[float, float]:
    """By which share of themselves (n, H) hidden states are off, and how much may be."""
    error = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    # The median, as one position may go to another expert by a rounding error.
    worst = max(part.median().item() for part in error.split([FIRST, len(error) - FIRST]))
    return worst, 0.01 + 16 * torch.finfo(model.backbone.dtype).eps


def _windowed_layers(config: Any) -> int:
    """How many layers have a sliding window that a text can outgrow."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return 0
    kinds = getattr(config, "layer_types", None)
    return int(kinds.count("sliding_attention") if kinds else config.num_hidden_layers)


def max_position(model: ValueModel) -> int:
    """Positions of the backbone. Raises CheckpointError if they depend on the text's length."""
    config = model.backbone.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        raise CheckpointError("its config has no max_position_embeddings")
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]  # one per layer type
    for part in nested or [rope]:
        kind = part.get("rope_type", "default")
        if kind == "dynamic":
            raise CheckpointError(f"rope_type: {kind!r} changes keys as a text grows: no cache")
        if kind == "longrope":
            limit = min(limit, part["original_max_position_embeddings"])
    return int(limit)
