"""vLLM's ranks: which one asks and speaks for all that run the same requests."""

from collections.abc import Callable
from typing import TypeVar

from lenvm_vllm.host.names import get_pp_group, get_tp_group, model_parallel_is_initialized

T = TypeVar("T")


def leads() -> bool:
    """Whether this rank speaks for all that run the same requests."""
    if not model_parallel_is_initialized():
        return True
    return bool(get_tp_group().rank_in_group == 0 and get_pp_group().is_last_rank)


def made_once(make: Callable[[], T]) -> T:
    """What `make` returns on the first tensor-parallel rank, on all of them."""
    group = get_tp_group() if model_parallel_is_initialized() else None
    if group is None or group.world_size == 1:
        return make()
    mine = make() if group.rank_in_group == 0 else None
    made: T = group.broadcast_object(mine, src=0)
    return made
