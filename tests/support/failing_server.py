"""`lenvm serve` with a model that fails for good: python -m tests.support.failing_server ARGS

From the moment on in which the file FAILS exists, every forward pass raises.
"""

import os
from pathlib import Path
from typing import Any

from lenvm_vllm.commands.cli import main
from value_server.engine.engine import Engine

forward = Engine._forward


def failing(self: Engine, *given: Any) -> Any:
    if Path(os.environ["FAILS"]).exists():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return forward(self, *given)


if __name__ == "__main__":
    Engine._forward = failing  # type: ignore[method-assign]
    main()
