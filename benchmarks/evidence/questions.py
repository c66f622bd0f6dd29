"""Questions with a checkable answer: GSM8K, MATH500, MathVista. math-verify compares them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.parser import StringExtractionConfig

from trainer.rollouts.pictured import as_part, picture_of
from trainer.rollouts.prompts import HUB, Hub, hub_rows
from trainer.rows import read_rows

LETTERS = tuple("ABCDEFGH")
BOXED_LETTER = re.compile(r"\\boxed\{(?:\\text\{)?\(?([A-H])\)?\}+")
SHAPE = "Solve this step by step and put the final answer in \\boxed{}."


@dataclass(frozen=True, slots=True)
class Question:
    """gold: the right answer, a letter where there are choices. picture: the part of a message
    that shows it, if there is one."""

    id: str
    text: str
    gold: str
    picture: Mapping[str, Any] | None = None

    def content(self, instruction: str) -> Any:
        """Of the user's message: a text, behind the picture if there is one."""
        text = f"{self.text}\n\n{instruction}"
        return text if self.picture is None else [self.picture, as_part(text)]

    def right(self, answer: str) -> bool:
        """Whether the answer's last statement is the gold one."""
        if self.gold in LETTERS:
            strings = [StringExtractionConfig(strings=LETTERS, lowercase=False)]
            named = BOXED_LETTER.sub(r"The answer is \1.", answer)
            return bool(verify(parse(self.gold, strings), parse(named, strings)))
        both = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
        return bool(verify(parse(f"${self.gold}$", both), parse(answer, both)))


def read_questions(source: Path, hub: Hub = Hub()) -> list[Question]:
    """JSON lines or the data set hub:NAME, with the columns of GSM8K (question, answer with ####),
    MATH500 (problem, answer) or MathVista.

    MathVista: pid, query, answer, choices, and as its picture decoded_image or image, a path from
    the folder of the file. Raises ValueError naming the line and what it lacks.
    """
    of_hub = str(source).startswith(HUB)
    rows = hub_rows(str(source), hub) if of_hub else read_rows(source)
    questions = []
    for number, row in enumerate(rows, 1):
        try:
            questions.append(_question(row, number, source.parent))
        except (KeyError, ValueError) as error:
            what = "row" if of_hub else "line"
            raise ValueError(f"{source}: {what} {number}: {error}") from error
    return questions


def _question(row: Mapping[str, Any], number: int, folder: Path) -> Question:
    if "problem" in row:
        return Question(str(number), row["problem"], str(row["answer"]))
    if "query" not in row:
        _, mark, gold = row["answer"].rpartition("####")
        if not mark:
            raise ValueError("answer: no number behind ####")
        return Question(str(number), row["question"], gold.strip().replace(",", ""))
    picture = picture_of("image", row.get("decoded_image") or row["image"], folder)
    gold, choices = str(row["answer"]), row.get("choices")
    gold = LETTERS[choices.index(gold)] if choices else gold
    return Question(str(row["pid"]), row["query"], gold, as_part(picture))
