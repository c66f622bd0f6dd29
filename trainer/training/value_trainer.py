"""The training loop: transformers' Trainer with the value loss.

Loss: the weighted mean of the token losses over a global batch; with equal weights the paper's
Eq. 9. That of a lookahead head is added (ahead.py).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer

from trainer.checks import check
from trainer.seen import pictures_of
from trainer.training.ahead import Ahead, Places, candidate_losses, places_of, sampled_loss
from trainer.training.even import make_even
from trainer.training.losses import losses_against, token_losses, token_targets
from trainer.training.objective import Objective
from trainer.training.steps import reading
from value_server.contract.targets import Readout

TRAINED_FILE = "trained.safetensors"


def held_out_loss(found: EvalPrediction) -> dict[str, float]:
    """The weighted mean over all held-out tokens, of `prediction_step`'s sums."""
    return {"loss": float(found.predictions.sum(dtype=float) / found.label_ids.sum(dtype=float))}


class ValueTrainer(Trainer):
    """Averages the loss over all weights of a global batch; a step saves what trains.

    per_scored: weight of all tokens over the number of positions with candidates, so that what
    these count for does not hang from how many were scored.
    """

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        readout: Readout,
        ahead: Ahead = Ahead(),
        per_scored: float = 1.0,
        **kwargs: Any,
    ) -> None:
        model = kwargs.get("model") or args[0]
        # Units of FSDP, of the decoder alone: a process may have no picture when another has.
        kinds = {type(part).__name__ for part in model.backbone.modules()}
        model._no_split_modules = [n for n in model.backbone._no_split_modules or () if n in kinds]
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:  # its own policy would round the weights of the head
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.objective = objective
        self.readout = readout
        self.ahead = ahead
        self.per_scored = per_scored
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the sum of weights itself

    def get_train_dataloader(self) -> DataLoader:
        """No pack twice in an epoch, whatever the number of processes."""
        loader: DataLoader = super().get_train_dataloader()
        make_even(loader)
        return loader

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        places = places_of(inputs) if self.ahead.lookahead else []
        with self._autocast():
            raw, after = self._forward(model, inputs, places)
        choices = (self.objective, self.readout)
        rows = (inputs["labels"], inputs["is_cut"], inputs["position_ids"])
        target = token_targets(raw, *rows, *choices)
        losses = losses_against(target, raw, inputs["is_cut"], *choices)
        loss = (losses * inputs["weights"]).sum()
        if places:
            told = inputs
            if self.ahead.sampled == "value":  # known of cut texts, too: no bound
                target = self.readout.output(raw.detach())
                told = inputs | {"is_cut": torch.zeros_like(inputs["is_cut"])}
            sampled = sampled_loss(after[0], places[0][0], target, told, *choices)
            loss = loss + self.ahead.lookahead_weight * sampled
        if len(places) > 1:
            loss = loss + self._candidate_loss(after[1], places[1][0], inputs)
        if num_items_in_batch is None:
            loss = loss / inputs["weights"].sum()
        else:
            # The sum is that of all processes, their gradients are averaged.
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        return (loss, raw) if return_outputs else loss

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """(None, (B,) summed losses, (B,) summed weights) of each row: the value's own loss."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self._autocast():
            raw, _ = self._forward(model, inputs)
        rows = (inputs["labels"], inputs["is_cut"], inputs["position_ids"])
        losses = token_losses(raw, *rows, self.objective.judged, self.readout)
        return None, (losses * inputs["weights"]).sum(-1), inputs["weights"].sum(-1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Raises ValueError where a step's loss or gradient is no number: nothing is learnt from
        there on. In float16 such steps are left out."""
        super().log(logs, *args, **kwargs)
        if self.args.fp16:
            return
        for name in ("loss", "grad_norm"):
            told = f"a smaller one: the {name} of step {self.state.global_step} is {logs.get(name)}"
            rate = self.args.learning_rate
            check(math.isfinite(logs.get(name, 0)), "learning_rate", rate, told)

    def _forward(
        self, model: Any, inputs: dict[str, Tensor], places: Sequence[Places] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """(B, T) raw outputs, and z after each of `places`, which count through all B·T.

        flash-attn tells packed texts apart by their positions in one row only: it gets one.
        """
        own = self.accelerator.unwrap_model(self.model).config
        rows = [inputs[name] for name in ("input_ids", "position_ids")]
        if "flash" in own._attn_implementation:
            rows = [row.flatten()[None] for row in rows]
        pictures = pictures_of(inputs)
        found = model(rows[0], position_ids=rows[1], raw=True, after=places, pictures=pictures)
        raw, after = found if places else (found, [])
        return raw.view_as(inputs["labels"]), after

    def _candidate_loss(self, z: Tensor, places: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Sum over positions with candidates. z: (N, K) after these, places: (N,)."""
        teacher, shares = (
            inputs[name].flatten(0, 1)[places] for name in ("candidate_z", "candidate_shares")
        )
        mean, within = candidate_losses(z, teacher, shares, self.ahead.within_exponent)
        both = self.ahead.mean_weight * mean + self.ahead.within_weight * within
        return self.per_scored * both.sum()

    def _autocast(self) -> torch.autocast:
        """Mixed precision; accelerate leaves it to FSDP where that is in use."""
        half = torch.float16 if self.args.fp16 else torch.bfloat16
        mixed = self.args.fp16 or self.args.bf16
        return torch.autocast(self.args.device.type, half, enabled=mixed)

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Tensor]], device: torch.device
    ) -> Tensor | None:
        """The weights of a global batch: transformers would count its labels."""
        if not batch_samples:
            return None
        total = torch.stack([batch["weights"].sum() for batch in batch_samples]).sum()
        gathered: Tensor = self.accelerator.gather(total.to(device))
        return gathered.sum()

    def _trained(self) -> dict[str, nn.Parameter]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What trains; `state_dict` holds whole weights where the parameters are sharded."""
        folder = Path(output_dir or self.args.output_dir or "")
        folder.mkdir(parents=True, exist_ok=True)
        weights = state_dict if self.is_fsdp_enabled else self._trained()
        save_file(
            {name: weights[name].detach().cpu().contiguous() for name in self._trained()},
            folder / TRAINED_FILE,
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where a run goes on from its last step: transformers would take one more."""
        stops = (c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
        waited = any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in stops)
        if waited or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        """Of all looks at the held-out prompts; nobody goes on before all have read it."""
        self._load_from_checkpoint(self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Every process reads the file and keeps its own share, which may be all."""
        with reading(resume_from_checkpoint):
            set_model_state_dict(
                self.accelerator.unwrap_model(self.model),
                load_file(Path(resume_from_checkpoint) / TRAINED_FILE),
                options=StateDictOptions(full_state_dict=True, strict=False),
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)
