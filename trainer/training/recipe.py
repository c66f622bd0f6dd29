"""How training runs: steps, batches, precision."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import getenv
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from cyclopts import Parameter
from transformers import TrainingArguments

from trainer.checks import check, check_choice, check_positive
from value_server.model.value_model import default_dtype

SLACK = 1 / 8  # of a step: that far from tokens_per_step larger passes go first

Batches = Literal["shuffled", "grouped"]
Scheduler = Literal["cosine", "linear", "constant"]
# Runs of before there was a choice did not tell them: told where they are not as they were.
LATER = ("packing", "scheduler", "weight_decay", "eval_steps", "patience")


@dataclass(frozen=True, slots=True)
class Step:
    """One of the optimizer's: each process takes `passes` passes of `packs_per_pass` packs."""

    processes: int
    passes: int
    packs_per_pass: int

    @property
    def packs(self) -> int:
        """Of all processes."""
        return self.processes * self.passes * self.packs_per_pass


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The optimizer's steps; the paper's own as defaults."""

    learning_rate: float = 2e-5
    """Highest learning rate of AdamW."""
    scheduler: Scheduler = "cosine"
    """What follows the warmup: a cosine or a straight line to 0, or no change."""
    weight_decay: float = 0.0
    """AdamW's; not of biases and norms."""
    epochs: float = 2.0
    """Passes over the data."""
    max_steps: int = -1
    """Ends training early; -1 leaves it to the epochs."""
    tokens_per_step: int = 16384
    """Tokens of one optimizer step of all processes: as near as packs of max_length come to it."""
    max_length: int = 3000
    """Tokens of a pack; longer texts are truncated, their labels stay true."""
    packs_per_pass: int = 1
    """Packs that a device takes at once, at most: more of them, padded to the longest, keep a GPU
    busy."""
    packing: bool = True
    """Several texts in a pack; else each has its own, as backbones need whose layers keep states.
    """
    batches: Batches = "shuffled"
    """All texts shuffled, or those of a prompt grouped side by side."""
    warmup_steps: int = 50
    """Steps in which the learning rate rises from 0."""
    bf16: bool | None = None
    """Mixed precision in bfloat16; by default where the device has it natively."""
    fp16: bool = False
    """Mixed precision in float16, for GPUs without bfloat16."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, to save memory."""
    save_steps: int = 50
    """Steps between two saves to OUTPUT/steps, which goes when training is done; with eval_steps
    each evaluation saves, and nothing else does."""
    eval_steps: int | None = None
    """Steps between two looks at the loss of the held-out prompts; the last step has one, too. The
    weights of the lowest become the checkpoint. By default none, and the last weights do."""
    patience: int | None = None
    """That many looks in a row without a lower loss end training."""
    seed: int = 0
    """Seed of the head, of the packs and of their order."""

    def check(self) -> None:
        """Raises ValueError naming the option that is wrong."""
        check_positive(
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            save_steps=self.save_steps,
            eval_steps=self.eval_steps,
            patience=self.patience,
        )
        alone = self.patience is None or self.eval_steps is not None
        check(alone, "patience", self.patience, "left out without eval_steps")
        check(0 <= self.weight_decay < 1, "weight_decay", self.weight_decay, "at least 0, below 1")
        check_choice("scheduler", self.scheduler, get_args(Scheduler))
        steps = self.max_steps
        check(steps > 0 or steps == -1, "max_steps", steps, "above 0, or -1")
        check(self.max_length > 1, "max_length", self.max_length, "above 1")
        check(self.tokens_per_step > 0, "tokens_per_step", self.tokens_per_step, "above 0")
        check(self.packs_per_pass > 0, "packs_per_pass", self.packs_per_pass, "above 0")
        check_choice("batches", self.batches, get_args(Batches))
        check(not (self.fp16 and self.bf16), "fp16", self.fp16, "left out beside bf16")
        on_gpu = torch.cuda.is_available()
        check(not self.fp16 or on_gpu, "fp16", self.fp16, "left out without a GPU")
        check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")

    @property
    def mixed(self) -> bool:
        """Whether training is in bfloat16."""
        if self.bf16 is not None or self.fp16:
            return bool(self.bf16)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return default_dtype(device) == torch.bfloat16

    def facts(self) -> dict[str, Any]:
        """What shapes the result."""
        facts = asdict(self) | {"bf16": self.mixed}
        del facts["save_steps"], facts["packs_per_pass"]
        for name in LATER:
            if facts[name] == getattr(Recipe, name):
                del facts[name]
        packs = self.step().packs
        told = {} if packs == self.tokens_per_step // self.max_length else {"packs_per_step": packs}
        return facts | told

    def step(self) -> Step:
        """What comes nearest to tokens_per_step: passes as large as they may be, or at least half
        of that where it brings a step nearer."""
        processes = int(getenv("WORLD_SIZE", "1"))
        packs = self.tokens_per_step / self.max_length / processes
        largest = min(self.packs_per_pass, max(round(packs), 1))
        fits = [
            Step(processes, max(round(packs / size), 1), size)
            for size in range(largest, (largest - 1) // 2, -1)
        ]
        off = [abs(fit.passes * fit.packs_per_pass - packs) for fit in fits]
        near = max(0.5, SLACK * packs, min(off))
        return next(fit for fit, own in zip(fits, off, strict=True) if own <= near)

    def told(self) -> str | None:
        """A line, where a step is not what tokens_per_step says."""
        step = self.step()
        if (tokens := step.packs * self.max_length) == self.tokens_per_step:
            return None
        return (
            f"tokens_per_step: {tokens} in place of {self.tokens_per_step}: {step.processes} "
            f"processes, {step.passes} passes of {step.packs_per_pass} packs of {self.max_length}"
        )

    def arguments(self, steps: Path, report_to: Sequence[str] = ()) -> TrainingArguments:
        """For transformers; `steps` is the folder of saved steps."""
        step = self.step()
        constant = self.scheduler == "constant"
        arguments = TrainingArguments(
            output_dir=str(steps),
            per_device_train_batch_size=step.packs_per_pass,
            gradient_accumulation_steps=step.passes,
            learning_rate=self.learning_rate,
            lr_scheduler_type="constant_with_warmup" if constant else self.scheduler,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            num_train_epochs=self.epochs,
            max_steps=self.max_steps,
            train_sampling_strategy="random" if self.batches == "shuffled" else "sequential",
            bf16=self.mixed,
            fp16=self.fp16,
            logging_steps=1,
            logging_nan_inf_filter=self.fp16,  # whose steps without a finite gradient are left out
            save_steps=self.eval_steps or self.save_steps,
            save_total_limit=1,
            eval_strategy="steps" if self.eval_steps else "no",
            eval_steps=self.eval_steps,
            per_device_eval_batch_size=step.packs_per_pass,
            load_best_model_at_end=self.eval_steps is not None,
            restore_callback_states_from_checkpoint=self.patience is not None,
            remove_unused_columns=False,
            report_to=[*report_to] or "none",
            ddp_find_unused_parameters=False,
            use_cpu=not torch.cuda.is_available(),
            seed=self.seed,
        )
        if arguments.n_gpu > 1:  # many GPUs are many processes: a row of packs cannot be split
            arguments._n_gpu = 1
        return arguments
