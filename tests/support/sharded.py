"""`lenvm …` with FSDP2 on CPUs, for tests: accelerate shards among GPUs only, torch anywhere.

With KILL_AFTER=N every process ends, without a word, amid the step after N.
"""

import os
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

import trainer.training.train
from lenvm_vllm.commands.cli import main
from trainer.training.value_trainer import ValueTrainer


class Sharded(ValueTrainer):
    def __init__(self, model: Any, arguments: Any, **options: Any) -> None:
        assert arguments.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().__init__(model, arguments, **options)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if str(self.state.global_step) == os.environ.get("KILL_AFTER"):
            units = [n for n, m in self.model.named_modules() if isinstance(m, FSDPModule)]
            os.write(1, f"sharded: {units}\n".encode())  # whole, whatever the other one writes
            os._exit(9)
        return super().compute_loss(*args, **kwargs)


if __name__ == "__main__":
    trainer.training.train.ValueTrainer = Sharded  # type: ignore[misc]
    main()
