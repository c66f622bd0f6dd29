"""How one text ended, and what its client is told of it.

A natural end is one that the unguided model gives a probability of at least NATURAL, or a stop
string. A whole one stands where a sentence or a block of code does. Any other is a cut.
"""

from dataclasses import dataclass
from typing import Any

from lenvm_vllm.steering.constants import NATURAL
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.telemetry.progress import Step
from lenvm_vllm.text.sentences import ends_sentence
from value_server.contract.units import UNITS, count

RESULT = "length_result"
ENDS = ("natural", "whole", "cut")  # best first


@dataclass(frozen=True)
class Outcome:
    """length: tokens of the completion, the end included.
    limited: cut by `max_tokens` or the context's end. stopped: by a stop string.
    step: what the engine knows of its last token; None where it tells nothing."""

    length: int
    text: str
    limited: bool
    stopped: bool
    step: Step | None

    @property
    def end(self) -> str:
        """One of ENDS."""
        known = self.step is not None and self.step.p_end >= NATURAL
        if not self.limited and (self.stopped or known):
            return "natural"
        return "whole" if ends_sentence(self.text) else "cut"

    @property
    def forced(self) -> bool:
        """Whether the target alone made it end here, where the model would not have."""
        forced = self.step is not None and self.step.forced and not self.limited
        return forced and self.end != "natural"

    def amount(self, unit: str) -> int:
        """Tokens, words or characters of it."""
        return self.length if unit == UNITS[0] else count(self.text, unit)

    def faults(self, target: LengthTarget) -> tuple[int, int]:
        """Less is better: the kind of its end, then the units by which it misses the target."""
        low, high = target.limits
        length = self.amount(target.unit)
        missed = {"at_most": length - high, "at_least": low - length}.get(
            target.mode, max(low - length, length - high)
        )
        return ENDS.index(self.end), max(missed, 0)

    def result(
        self, target: LengthTarget, sampled: int, endings: int, predicted: int | None
    ) -> dict[str, Any]:
        """The object RESULT of an answer.

        sampled: tokens of all endings or answers that were sampled, of which there are `endings`.
        predicted: tokens that were forecast.
        """
        step, asked = self.step, target.model_dump(exclude_none=True, exclude_defaults=True)
        return {
            "target": {"mode": target.mode} | asked,
            "tokens": self.length if step is None else step.counted,
            **{unit: self.amount(unit) for unit in UNITS[1:]},
            "end": None if step is None else self.end,
            "forced": None if step is None else self.forced,
            "passed_rail": None if step is None else step.gave_way,
            "steps": None if step is None else step.steps,
            "steered_steps": None if step is None else step.steered,
            "endings": endings,
            "sampled_tokens": sampled,
            "predicted_tokens": predicted,
        }
