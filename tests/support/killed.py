"""`lenvm …` that ends by SIGKILL amid its work, for tests.

The KILL_AT-th text that a server is asked for, pack that is trained on or text that is evaluated
is the last thing it does.
"""

import os
import signal
from collections.abc import Callable
from itertools import count
from typing import Any

import trainer.evaluation.predict
from lenvm_vllm.commands.cli import main
from trainer.rollouts.samplers import ServerSampler
from trainer.training.value_trainer import ValueTrainer


def fatal(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = count(1)

    def counted(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        if next(calls) == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return counted


if __name__ == "__main__":
    ServerSampler._one = fatal(ServerSampler._one)  # type: ignore[method-assign]
    ValueTrainer.compute_loss = fatal(ValueTrainer.compute_loss)  # type: ignore[method-assign]
    trainer.evaluation.predict.predict = fatal(trainer.evaluation.predict.predict)
    main()
