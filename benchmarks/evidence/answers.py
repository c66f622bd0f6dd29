"""Answers of a guided model that is served somewhere, or by servers of our own."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclopts import Parameter
from transformers import AutoTokenizer

from benchmarks.endpoint import Job, without_row
from benchmarks.evidence import countdown
from benchmarks.evidence.arms import RAMP, check_served
from benchmarks.provenance import settings
from benchmarks.servers import digest, endpoint_at
from lenvm_vllm.commands.demo import CHECKPOINT, MODEL
from trainer.checks import check_positive
from trainer.rows import Rows


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Served:
    """The model that is asked, and the value model that guides it."""

    model: str = str(MODEL)
    """Hub name or folder to serve; with --url the name that it is served under there."""
    weights: str | None = None
    """Hub name or folder of the same model for its tokenizer and for perplexities, where `model`
    is neither."""
    url: str | None = None
    """Of a vLLM with the plugin and its value server, with its /v1."""
    checkpoint: Path = CHECKPOINT
    """Value model to serve; with --url the one that is served there."""
    concurrency: int = 32
    """Requests at a time."""
    max_model_len: int = 4096
    """Tokens of a prompt, its pictures' among them, and its answer, of our own server."""
    dtype: str | None = None
    """Of both models; by default what the device multiplies natively."""
    seed: int = 0
    """Of the choice of data, and of the sampling of our own server."""

    @property
    def files(self) -> str:
        """Where the model's tokenizer and weights are."""
        return self.weights or self.model

    def settings(self) -> dict[str, Any]:
        """What shapes the answers; of our own servers also what the environment tells them."""
        value_model = digest(self.checkpoint)
        own = {"model": Path(self.model).name, "value_model": value_model, "seed": self.seed}
        if self.url:
            return own
        told = settings(os.environ).items()
        dtype = {"dtype": self.dtype} if self.dtype else {}
        return own | dtype | {name: value for name, value in told if name.startswith("LENVM_")}

    def answers(
        self, jobs: Sequence[Job], output: Path, arms: tuple[str, ...]
    ) -> list[dict[str, Any]]:
        """A row for each job; those that `output` holds are not asked for again.

        arms: that the server has to know. Raises ValueError for one that it does not, and as
        `without_row`.
        """
        check_positive(concurrency=self.concurrency, max_model_len=self.max_model_len)
        stored = Rows(output / "answers.jsonl")
        if without_row(jobs, stored):
            with endpoint_at(
                self.url,
                self.model,
                self.checkpoint,
                output,
                concurrency=self.concurrency,
                max_model_len=self.max_model_len,
                dtype=self.dtype,
                seed=self.seed,
                ramp=any(arm.startswith(RAMP) for arm in arms),
            ) as endpoint:
                check_served(arms, endpoint)
                endpoint.answer(jobs, stored, self._measured(arms))
        return [stored[job.key] for job in jobs]

    def _measured(self, arms: tuple[str, ...]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """What is kept of an answer: of the countdown the text that it counts."""
        if countdown.ARM not in arms:
            return lambda row: row
        tokenizer = AutoTokenizer.from_pretrained(self.files)

        def kept(row: dict[str, Any]) -> dict[str, Any]:
            return countdown.measured(row, tokenizer) if row["arm"] == countdown.ARM else row

        return kept
