"""Prompts to sample completions of: from JSON lines, or from a hub data set, by a preset or not."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from cyclopts import Parameter

from trainer.checks import check, check_positive
from trainer.rollouts.codereasoning import question_of
from trainer.rollouts.pictured import Turns, as_messages, pictures_in, pictures_of, turns_of
from trainer.rows import read_rows
from value_server.model.pictures import Picture

HUB = "hub:"


@dataclass(frozen=True, slots=True)
class Prompt:
    """text: what the user says last. turns: a whole conversation up to it, where that is given;
    pictures: all that are in it, or that go before the text."""

    id: str
    domain: str
    text: str
    system: str = ""
    pictures: tuple[Picture, ...] = ()
    turns: Turns = ()

    def messages(self) -> list[dict[str, Any]]:
        """What the model is asked: the turns, or else the pictures and the text."""
        turns: Turns = self.turns or (("user", (*self.pictures, self.text)),)
        if self.system and turns[0][0] != "system":
            turns = (("system", (self.system,)), *turns)
        return as_messages(turns)


@dataclass(frozen=True, slots=True)
class Preset:
    """A hub data set. `text` gives a row's prompt, None where it has none; `picture`: the column
    with a picture of it."""

    data: str
    split: str
    domain: str
    template: str
    text: Callable[[Mapping[str, Any]], str | None]
    picture: str | None = None


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
    picture_column: str = "images"
    """Column that holds the pictures of a prompt, if any: one or several paths, data: URLs or
    pictures of a data set. They go before the text."""
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
            rows = hub_rows(name, self.hub)
            prompts = _of_rows(name, "row", rows, Path(), self)
        else:
            prompts = _of_rows(name, "line", read_rows(source), source.parent, self)
        for prompt in islice(prompts, self.limit):
            alone = not (prompt.turns and self.template)
            check(alone, "template", self.template, "left out with messages")
            text, system = template.format(prompt=prompt.text), prompt.system or self.system
            yield replace(prompt, text=text, system=system)


def _first_turn(row: Mapping[str, Any]) -> str | None:
    turn = row["conversation"][0]
    return turn["content"] if turn["role"] == "user" else None


# Data sets that the paper trains or measures on; the wording is ours.
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
    "mathvista": Preset(
        "AI4Math/MathVista",
        "testmini",
        "vision",
        "{prompt}",
        lambda row: row["query"],
        "decoded_image",
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


def _of_rows(
    source: str, what: str, rows: Iterable[Any], folder: Path, selection: Selection
) -> Iterator[Prompt]:
    column, pictures = selection.column, selection.picture_column
    for number, row in enumerate(rows):
        place = f"{source}: {what} {number + 1}"
        if not isinstance(system := row.get("system") or "", str):
            raise ValueError(f"{place}: system: {system!r}, must be a text")
        own = (_text(row.get("id"), number), _text(row.get("domain"), ""))
        if column not in row and "messages" in row:
            turns = turns_of(place, row["messages"], folder)
            text = "\n".join(part for part in turns[-1][1] if isinstance(part, str))
            yield Prompt(*own, text, system, pictures_of(turns), turns)
            continue
        if not isinstance(row.get(column), str):
            raise ValueError(f"{place}: {column}: missing or not a text")
        shown = pictures_in(place, pictures, row.get(pictures), folder)
        yield Prompt(*own, row[column], system, shown)


def _text(value: Any, missing: object) -> str:
    return str(missing if value is None else value)


def hub_rows(source: str, hub: Hub) -> Iterable[Any]:
    """Of the data set hub:NAME, pictures as bytes."""
    from datasets import load_dataset

    name = source.removeprefix(HUB)
    return _undecoded(load_dataset(name, hub.subset, split=hub.split, streaming=True))


def _undecoded(rows: Any) -> Any:
    """Pictures as the bytes that they are stored in."""
    from datasets import Image

    for name, kind in (getattr(rows, "features", None) or {}).items():
        if isinstance(kind, Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows


def _of_preset(name: str, preset: Preset) -> Iterator[Prompt]:
    """Each text once: some of the sets repeat a question with every answer."""
    from datasets import load_dataset

    seen: set[int] = set()
    rows = _undecoded(load_dataset(preset.data, split=preset.split, streaming=True))
    for number, row in enumerate(rows):
        text, column = preset.text(row), preset.picture or ""
        shown = pictures_in(f"{name}: row {number + 1}", column, row.get(column), Path())
        if text and (key := hash((text, shown))) not in seen:
            seen.add(key)
            yield Prompt(f"{name}-{number}", preset.domain, text, pictures=shown)
