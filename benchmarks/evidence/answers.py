"""Answers of a guided model that is served somewhere, or by servers of our own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclopts import Parameter
from transformers import AutoTokenizer

from benchmarks.endpoint import Job
from benchmarks.evidence import countdown
from benchmarks.evidence.arms import check_arms
from benchmarks.servers import digest, endpoint_at
from lenvm_vllm.commands.demo import CHECKPOINT, MODEL
from trainer.checks import check_positive
from trainer.rows import Rows
from value_server.contract.units import UNITS


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
        """What shapes the answers."""
        value_model = digest(self.checkpoint)
        return {"model": Path(self.model).name, "value_model": value_model, "seed": self.seed}

    def answers(
        self, jobs: Sequence[Job], output: Path, arms: tuple[str, ...], unit: str = UNITS[0]
    ) -> list[dict[str, Any]]:
        """A row for each job; those that `output` holds are not asked for again.

        arms: that the server has to know. Raises ValueError for one that it does not.
        """
        check_positive(concurrency=self.concurrency, max_model_len=self.max_model_len)
        stored = Rows(output / "answers.jsonl")
        if any(job.key not in stored for job in jobs):
            with endpoint_at(
                self.url,
                self.model,
                self.checkpoint,
                output,
                concurrency=self.concurrency,
                max_model_len=self.max_model_len,
                dtype=self.dtype,
                seed=self.seed,
            ) as endpoint:
                check_arms(arms, endpoint, unit)
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
