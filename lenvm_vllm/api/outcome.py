"""How one text ended, and what its client is told of it and of how far a stream is.

A natural end is one that the unguided model gives a probability of at least NATURAL, or a stop
string. A whole one stands where a sentence or a block of code does. Any other is a cut.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lenvm_vllm.api.texts import Text
from lenvm_vllm.steering.constants import NATURAL
from lenvm_vllm.target.request import LengthTarget
from lenvm_vllm.telemetry.progress import Known, Step
from lenvm_vllm.text.sentences import is_whole
from value_server.contract.units import UNITS, count, tokens_per_unit

RESULT, PROGRESS = "length_result", "length_progress"
ENDS = ("natural", "whole", "cut")  # best first


@dataclass(frozen=True)
class Outcome:
    """length: tokens of the completion, the end included. limited, stopped: as of `Text`.
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
        return "whole" if is_whole(self.text) else "cut"

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
        short = 0 if target.mode == "at_most" else low - length
        long = 0 if target.mode == "at_least" else length - high
        return ENDS.index(self.end), max(short, long, 0)


@dataclass(frozen=True)
class Report:
    """Of the texts of one request.

    key: by which the engine knows them. predicted: tokens that were forecast. echoes: the prompts,
    where the answer repeats them before their `each` texts; they are none of the text.
    """

    target: LengthTarget
    known: Known
    key: str
    predicted: int | None = None
    echoes: Sequence[str] = ()
    each: int = 1

    def outcome(self, text: Text) -> Outcome:
        """With what the engine knows of the last of its tokens."""
        step = self.known.step(self.key, text.ids, text.count)
        length = text.count or (step.counted if step else 0)
        prompt = text.body.get("index", 0) // self.each if self.echoes else 0
        own = text.text.removeprefix("".join(self.echoes[prompt : prompt + 1]))
        return Outcome(length, own, text.limited, text.stopped, step)

    def put(self, text: Text, outcome: Outcome, sampled: int = 0, endings: int = 1) -> None:
        """Its RESULT into a text's own object. sampled, endings: as of `Sampled`."""
        if outcome.forced and outcome.end == "cut":
            text.call_cut()
        step = outcome.step
        asked = self.target.model_dump(exclude_none=True, exclude_defaults=True)
        text.body[RESULT] = {
            "target": {"mode": self.target.mode} | asked,
            "tokens": outcome.length if step is None else step.counted,
            **{unit: outcome.amount(unit) for unit in UNITS[1:]},
            "end": None if step is None else outcome.end,
            "forced": None if step is None else outcome.forced,
            "passed_rail": None if step is None else step.gave_way,
            "steps": None if step is None else step.steps,
            "steered_steps": None if step is None else step.steered,
            "endings": endings,
            "sampled_tokens": sampled or outcome.length,
            "predicted_tokens": self.predicted,
        } | ({"unseen": True} if step is not None and step.unseen else {})

    def progress(self, ids: list[int], text: str) -> dict[str, Any] | None:
        """What a stream tells of a text so far: tokens, those that are expected still, and the
        probability of an end where its last one stands; None for what is not known. Of a target
        in another unit also its words or characters, and how many of them are expected still."""
        if (step := self.known.step(self.key, ids, len(ids))) is None:
            return None
        known = step.valued and math.isfinite(step.expected)
        expected = round(step.expected, 1) if known else None
        p_end = None if math.isnan(step.p_end) else round(step.p_end, 6)
        told = {"tokens": step.counted, "expected": expected, "p_end": p_end}
        unit = self.target.unit
        if unit == UNITS[0]:
            return told
        amount = count(text, unit)
        ratio = tokens_per_unit(unit, step.counted, amount)
        rest = None if expected is None else round(expected / ratio, 1)
        return told | {unit: amount, f"expected_{unit}": rest}
