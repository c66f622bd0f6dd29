"""LIFEBench's tasks: as it asks for them, in words, and in the paper's token setting.

It counts an English word as one, and a Chinese character as one: both are what `words` counts,
which leaves punctuation out and takes the word as one in a Chinese text as well.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trainer.rows import read_rows
from value_server.contract.units import UNITS, WORDS

T = TypeVar("T")
OWN = WORDS  # LIFEBench's own unit, in both of its languages
MODE_NAMES = {
    "en": {"equal_to": "equal to", "at_most": "at most", "at_least": "at least"},
    "cn": {"equal_to": "等于", "at_most": "至多", "at_least": "至少"},
}
OWN_MODE_NAMES = {"at_most": "至多有", "at_least": "至少有"}  # of Chinese, where it counts words
TOKENS = {
    "en": (("{word_count} words long", "{word_count} tokens long"),),
    "cn": (
        ("字数必须{word_count_type}", "token数必须{word_count_type}"),
        ("{word_count}字", "{word_count}个token"),
    ),
}


@dataclass(frozen=True, slots=True)
class Task:
    """kind: as qa or create. text: with {word_count_type} and {word_count}."""

    id: str
    kind: str
    language: str
    text: str

    def prompt(self, mode: str, amount: int, unit: str = UNITS[0]) -> str:
        """The text that asks for this length, in tokens or OWN."""
        text, name = self.text, MODE_NAMES[self.language][mode]
        if unit == UNITS[0]:
            for words, instead in TOKENS[self.language]:
                text = text.replace(words, instead)
        elif self.language == "cn":
            name = OWN_MODE_NAMES.get(mode, name)
        return text.replace("{word_count_type}", name).replace("{word_count}", str(amount))


def read_tasks(path: Path) -> list[Task]:
    """JSON lines as LIFEBench has them. Raises ValueError naming the line and what it lacks."""
    tasks = []
    for number, row in enumerate(read_rows(path), 1):
        try:
            task = Task(str(row["id"]), row["category"], row["lang"], row["task"])
        except KeyError as error:
            raise ValueError(f"{path}: line {number}: no {error.args[0]!r}") from error
        known = TOKENS.get(task.language, ())
        if not known or any(words not in task.text for words, _ in known):
            raise ValueError(f"{path}: line {number}: task: no length in words that is known")
        tasks.append(task)
    return tasks


def stratified(
    items: Sequence[T], stratum: Callable[[T], Hashable], limit: int | None, seed: int
) -> list[T]:
    """`limit` items, all strata in turn, each in a random order; those of a lower limit first."""
    strata: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        strata[stratum(item)].append(item)
    chance = random.Random(seed)
    for members in strata.values():
        chance.shuffle(members)
    longest = max(map(len, strata.values()), default=0)
    turns = [members[i] for i in range(longest) for members in strata.values() if i < len(members)]
    return turns[:limit]
