"""What the demo asks: the same prompts in several arms, and what came of it.

An arm is a way to ask for a length: in the prompt, by `length_target`, by both or not at all.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from openai import APIError

from lenvm_vllm.api.outcome import RESULT
from lenvm_vllm.target.misplaced import FIELD
from value_server.contract.units import count

MOST = 512  # tokens, of answers that would go on
PROMPTS = (
    "Describe a walk through a forest in autumn.",
    "Explain how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper.",
    "What should one think of before adopting a dog?",
)
TARGETS = (50, 100, 200)
_SAID = {
    "tokens": "Your answer must be equal to {} tokens.",
    "words": "Answer in about {} words.",
}


@dataclass(frozen=True, slots=True)
class Length:
    number: int
    unit: str = "tokens"

    def __str__(self) -> str:
        return f"{self.number} {self.unit}"

    @property
    def sentence(self) -> str:
        """By which a prompt asks for it."""
        return _SAID[self.unit].format(self.number)


@dataclass(frozen=True, slots=True)
class Arm:
    """says: whether the prompt does. options: of the field beside the length; None: no field."""

    name: str
    label: str
    says: bool
    options: dict[str, Any] | None

    def prompt(self, prompt: str, length: Length) -> str:
        return f"{prompt} {length.sentence}" if self.says else prompt

    def fields(self, length: Length) -> dict[str, Any]:
        """What the request has beside the prompt."""
        if self.options is None:
            return {}
        if length.unit == "tokens" and not self.options:
            return {FIELD: length.number}
        return {FIELD: {length.unit: length.number, **self.options}}


FREE = Arm("free", "nothing", False, None)
UNGUIDED = Arm("unguided", "the prompt", True, None)
DEFAULT = Arm("default", 'the field "length_target"', False, {})
BOTH = Arm("default", "the prompt and the field", True, {})
EXACT = Arm("exact", 'the field, "tolerance": 0', False, {"tolerance": 0})
GUIDED = Arm("guided", 'the field, "tolerance": null', False, {"tolerance": None})
ARMS = (FREE, UNGUIDED, DEFAULT, BOTH, EXACT, GUIDED)
IN_TOKENS = tuple(map(Length, TARGETS))
IN_WORDS = Length(60, "words")
LENGTHS = (*IN_TOKENS, IN_WORDS)


@dataclass(frozen=True, slots=True)
class Question:
    """One request. Its answer counts for each length, of which only one that tells none has
    several."""

    arm: Arm
    prompt: str
    lengths: tuple[Length, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """count: its length, in the unit of the one that was wanted. end: natural, whole, cut or None
    (unknown) of `length_result`; without a target "own" or "max_tokens". seconds: None where
    others were asked meanwhile."""

    arm: Arm
    prompt: str
    length: Length
    count: int
    end: str | None
    forced: bool
    seconds: float | None
    text: str

    @property
    def deviation(self) -> float:
        """(L - N) / N in percent."""
        return 100 * (self.count - self.length.number) / self.length.number

    @property
    def ends_well(self) -> bool:
        return self.end in ("natural", "whole", "own")

    def row(self) -> dict[str, Any]:
        """For a file of such, one a line."""
        return {
            "arm": self.arm.name,
            "prompt": self.arm.prompt(self.prompt, self.length),
            **self.arm.fields(self.length),
            "target": self.length.number,
            "unit": self.length.unit,
            "length": self.count,
            "end": self.end,
            "forced": self.forced,
            "seconds": self.seconds,
            "text": self.text,
        }


# Writes a chat completion: the OpenAI client's `chat.completions.create`, with its model.
Create = Callable[..., Any]


def ask(create: Create, question: Question) -> list[Answer]:
    """An answer for each of the question's lengths, all of them of one text.

    Raises RuntimeError, with the server's own words, where it has none.
    """
    arm, prompt, length = question.arm, question.prompt, question.lengths[0]
    begun = time.monotonic()
    try:
        reply = create(
            messages=[{"role": "user", "content": arm.prompt(prompt, length)}],
            temperature=1.0,
            max_tokens=MOST,
            seed=1,
            extra_body={"top_k": 15, **arm.fields(length)},
        )
    except APIError as error:
        words = error.body["message"] if isinstance(error.body, dict) else error.message
        asked = arm.fields(length) or "no length"
        raise RuntimeError(f"vLLM did not answer a request with {asked}: {words}") from error
    seconds = round(time.monotonic() - begun, 2)
    (choice,) = reply.choices
    result = getattr(choice, RESULT, None) or {}
    own = "own" if choice.finish_reason == "stop" else "max_tokens"
    end = own if arm.options is None else result.get("end")
    forced, text = bool(result.get("forced")), choice.message.content or ""
    counts = {"tokens": reply.usage.completion_tokens, "words": count(text, "words")}
    return [
        Answer(arm, prompt, length, counts[length.unit], end, forced, seconds, text)
        for length in question.lengths
    ]


def ask_all(
    create: Create,
    questions: Sequence[Question],
    at_once: int = 1,
    waiting: Callable[[int], None] = lambda done: None,
) -> Iterator[Answer]:
    """Answers in the order of the questions, so many asked at a time. Raises what `ask` does.

    waiting: is told twice a second how many have come.
    """
    pool = ThreadPoolExecutor(at_once)
    try:
        asked = [pool.submit(ask, create, question) for question in questions]
        for future in asked:
            while not wait([future], timeout=0.5).done:
                waiting(sum(other.done() for other in asked))
            for answer in future.result():
                yield answer if at_once == 1 else replace(answer, seconds=None)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # who leaves ends the servers, not these


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Mean |L - N| / N of each arm in percent (`_ld`), how the default's texts end, and seconds.

    Of the answers in tokens; under "words" of those in words.
    """

    def of(name: str, unit: str = "tokens") -> list[Answer]:
        return [a for a in answers if (a.arm.name, a.length.unit) == (name, unit)]

    def off(name: str, unit: str = "tokens") -> float:
        return round(fmean(abs(a.deviation) for a in of(name, unit)), 2)

    compared = ("unguided", "default")
    return {
        "targets": list(TARGETS),
        "prompts": len({a.prompt for a in answers}),
        **{f"{name}_ld": off(name) for name in ("unguided", "guided", "exact", "default")},
        "default_whole": round(fmean(a.ends_well for a in of("default")), 3),
        "seconds_per_request": {
            name: round(fmean(a.seconds or 0 for a in of(name)), 2) for name in compared
        },
        "words": {
            "targets": [IN_WORDS.number],
            **{f"{name}_ld": off(name, IN_WORDS.unit) for name in compared},
        },
    }
