"""What this process serves, as vLLM told it at its start."""

from typing import Any

# The VllmConfig of this process's API server, for its middleware. Several models in one process
# (the offline `LLM` class) have no API server: each request brings the configuration of its own.
config: Any = None
# Whether the operator wants answers in vLLM's log (`--enable-log-outputs`).
logs_answers = False
