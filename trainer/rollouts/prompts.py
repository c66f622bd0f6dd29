"""Prompts to sample completions of: from JSON lines, or from a hub data set, by a preset or not."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from cyclopts import Parameter

from trainer.checks import check_positive
from trainer.rollouts.codereasoning import question_of
from trainer.rows import read_rows

HUB = "hub:"


@dataclass(frozen=True, slots=True)
class Prompt:
    id: str
    domain: str
    text: str
    system: str = ""

    def messages(self) -> list[dict[str, str]]:
        """What the model is asked."""
        asked = [{"role": "user", "content": self.text}]
        return [{"role": "system", "content": self.system}, *asked] if self.system else asked


@dataclass(frozen=True, slots=True)
class Preset:
    """A hub data set. `text` gives a row's prompt, None where it has none."""

    data: str
    split: str
    domain: str
    template: str
    text: Callable[[Mapping[str, Any]], str | None]


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Where in a hub data set the prompts are."""

    subset: str | None = None
    """Configuration of the data set, where it has several."""
    split: str = "train"
    """Split of the data set."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which prompts of a source are taken, and with what around them."""

    template: str | None = None
    """Text around each {prompt}; by default that of a preset, or none."""
    column: str = "prompt"
    """Column of a file or data set that holds the prompt, if another."""
    system: str = ""
    """System prompt of all that bring none in a column `system`."""
    hub: Hub = Hub()
    limit: int | None = None
    """Use only this many prompts, the first ones."""

    def check(self) -> None:
        """Raises ValueError naming the option that is wrong."""
        check_positive(limit=self.limit)
        if self.template is not None:
            check_template(self.template)

    def read(self, source: Path) -> Iterator[Prompt]:
        """Prompts of a JSONL file, plain or gzip, of the data set hub:NAME, or of a preset's.

        Raises ValueError naming the line and the missing field.
        """
        name = str(source)
        template = self.template or "{prompt}"
        if preset := PRESETS.get(name):
            template = self.template or preset.template
            prompts = _of_preset(name, preset)
        elif name.startswith(HUB):
            rows = _hub_rows(name.removeprefix(HUB), self.hub)
            prompts = _of_rows(name, "row", rows, self.column)
        else:
            prompts = _of_rows(name, "line", read_rows(source), self.column)
        for prompt in islice(prompts, self.limit):
            text, system = template.format(prompt=prompt.text), prompt.system or self.system
            yield replace(prompt, text=text, system=system)


def _first_turn(row: Mapping[str, Any]) -> str | None:
    turn = row["conversation"][0]
    return turn["content"] if turn["role"] == "user" else None


# The data sets that the paper trains on; the wording is ours.
PRESETS = {
    "opencodereasoning-2-python": Preset(
        "nvidia/OpenCodeReasoning-2",
        "python",
        "code",
        "Solve this programming problem step by step, then give the whole solution in one block "
        "of Python code.\n\n{prompt}",
        question_of,
    ),
    "wildchat": Preset("allenai/WildChat", "train", "instruct", "{prompt}", _first_turn),
    "deepmath-103k": Preset(
        "zwhe99/DeepMath-103K",
        "train",
        "math",
        "Solve this problem step by step and put the final answer in \\boxed{{}}.\n\n{prompt}",
        lambda row: row["question"],
    ),
}


def check_template(template: str) -> None:
    """Raises ValueError unless `template` has a place for the prompt and for nothing else."""
    try:
        filled = template.format(prompt="\0")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"template: {template!r}, {error!r}; {{{{ and }}}} write braces"
        ) from error
    if "\0" not in filled:
        raise ValueError(f"template: {template!r}, must contain {{prompt}}")


def _of_rows(source: str, what: str, rows: Iterable[Any], column: str) -> Iterator[Prompt]:
    for number, row in enumerate(rows):
        if not isinstance(row.get(column), str):
            raise ValueError(f"{source}: {what} {number + 1}: {column}: missing or not a text")
        if not isinstance(system := row.get("system") or "", str):
            raise ValueError(f"{source}: {what} {number + 1}: system: {system!r}, must be a text")
        own = (str(row.get("id", number)), str(row.get("domain", "")), row[column])
        yield Prompt(*own, system)


def _hub_rows(name: str, hub: Hub) -> Iterable[Any]:
    from datasets import load_dataset

    return load_dataset(name, hub.subset, split=hub.split, streaming=True)


def _of_preset(name: str, preset: Preset) -> Iterator[Prompt]:
    """Each text once: some of the sets repeat a question with every answer."""
    from datasets import load_dataset

    seen: set[int] = set()
    for number, row in enumerate(load_dataset(preset.data, split=preset.split, streaming=True)):
        text = preset.text(row)
        if text and hash(text) not in seen:
            seen.add(hash(text))
            yield Prompt(f"{name}-{number}", preset.domain, text)
