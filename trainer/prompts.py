"""Prompts to sample completions of: from JSON lines, or from a hub data set by a preset."""

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.codereasoning import question_of


@dataclass(frozen=True, slots=True)
class Prompt:
    id: str
    domain: str
    text: str


@dataclass(frozen=True, slots=True)
class Preset:
    """A hub data set. `text` gives a row's prompt, None where it has none."""

    data: str
    split: str
    domain: str
    template: str
    text: Callable[[Mapping[str, Any]], str | None]


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


def read_prompts(source: Path, template: str | None = None) -> Iterator[Prompt]:
    """Prompts of a JSONL file, plain or gzip, or of the data set that a preset names.

    `template` wraps each, by default that of the preset. Raises ValueError naming the line and
    the missing field.
    """
    preset = PRESETS.get(str(source))
    template = template or (preset.template if preset else "{prompt}")
    for prompt in _of_preset(str(source), preset) if preset else _of_file(source):
        yield Prompt(prompt.id, prompt.domain, template.format(prompt=prompt.text))


def _of_file(path: Path) -> Iterator[Prompt]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number + 1}: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise ValueError(f"{path}: line {number + 1}: prompt: missing or not a text")
            yield Prompt(str(row.get("id", number)), str(row.get("domain", "")), row["prompt"])


def _of_preset(name: str, preset: Preset) -> Iterator[Prompt]:
    """Each text once: some of the sets repeat a question with every answer."""
    from datasets import load_dataset

    seen: set[int] = set()
    for number, row in enumerate(load_dataset(preset.data, split=preset.split, streaming=True)):
        text = preset.text(row)
        if text and hash(text) not in seen:
            seen.add(hash(text))
            yield Prompt(f"{name}-{number}", preset.domain, text)
