"""Model Runner V1's batch by hand: a processor, what is told to it, and what it does to rows.

Legend: V vocabulary. Token 0 is the end; token x is worth x more tokens.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate

from lenvm_vllm.engine.processor import LenvmLogitsProcessor
from lenvm_vllm.values.client import TimedOut
from tests.support import fakes
from tests.support.fakes import Server, V, config, replicas_of


def processor_with(server: Server) -> LenvmLogitsProcessor:
    return LenvmLogitsProcessor(config(), torch.device("cpu"), False, client=replicas_of(server))


def update(removed: Any = (), added: Any = (), moved: Any = ()) -> BatchUpdate:
    return BatchUpdate(batch_size=0, removed=removed, added=added, moved=moved)


def added(row: int, wanted: SamplingParams, output: list[int] | None = None) -> Any:
    return row, wanted, [7, 8], [] if output is None else output


def apply(served: LenvmLogitsProcessor, logits: Tensor) -> Tensor:
    changed = logits.clone()
    assert served.apply(changed) is changed
    return changed


def suppressed(served: LenvmLogitsProcessor, rows: int = 4) -> dict[int, list[int]]:
    """The tokens that each row that is not left alone must not take."""
    after = apply(served, torch.zeros(rows, V))
    blocked = {row: after[row].isneginf().nonzero()[:, 0].tolist() for row in range(rows)}
    return {row: tokens for row, tokens in blocked.items() if tokens}


def rails_only() -> LenvmLogitsProcessor:
    served = processor_with(Server(TimedOut("slow")))
    fakes.rails_only(served.batch.rows)
    return served
