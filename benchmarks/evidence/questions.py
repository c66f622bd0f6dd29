"""Questions with a checkable answer: GSM8K, MATH500, MathVista. math-verify compares them."""

import base64
import mimetypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.parser import StringExtractionConfig

from trainer.rows import read_rows

LETTERS = tuple("ABCDEFGH")
BOXED_LETTER = re.compile(r"\\boxed\{(?:\\text\{)?\(?([A-H])\)?\}+")
SHAPE = "Solve this step by step and put the final answer in \\boxed{}."


@dataclass(frozen=True, slots=True)
class Question:
    """gold: the right answer, a letter where there are choices. image: file, if it has one."""

    id: str
    text: str
    gold: str
    image: Path | None = None

    def content(self, instruction: str) -> Any:
        """Of the user's message: a text, behind the picture if there is one."""
        text = f"{self.text}\n\n{instruction}"
        if self.image is None:
            return text
        kind = mimetypes.guess_type(self.image)[0] or "image/jpeg"
        data = base64.b64encode(self.image.read_bytes()).decode()
        picture = {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
        return [picture, {"type": "text", "text": text}]

    def right(self, answer: str) -> bool:
        """Whether the answer's last statement is the gold one."""
        if self.gold in LETTERS:
            strings = [StringExtractionConfig(strings=LETTERS, lowercase=False)]
            named = BOXED_LETTER.sub(r"The answer is \1.", answer)
            return bool(verify(parse(self.gold, strings), parse(named, strings)))
        both = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
        return bool(verify(parse(f"${self.gold}$", both), parse(answer, both)))


def read_questions(path: Path) -> list[Question]:
    """JSON lines of GSM8K (question, answer with ####), MATH500 (problem, answer) or MathVista.

    MathVista: pid, query, answer, choices and, beside the file, image. Raises ValueError naming
    the line and what it lacks.
    """
    questions = []
    for number, row in enumerate(read_rows(path), 1):
        try:
            questions.append(_question(row, number, path.parent))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: line {number}: {error}") from error
    return questions


def _question(row: Mapping[str, Any], number: int, folder: Path) -> Question:
    if "problem" in row:
        return Question(str(number), row["problem"], str(row["answer"]))
    if "query" not in row:
        _, mark, gold = row["answer"].rpartition("####")
        if not mark:
            raise ValueError("answer: no number behind ####")
        return Question(str(number), row["question"], gold.strip().replace(",", ""))
    image = folder / row["image"]
    if not image.is_file():
        raise ValueError(f"image: no file {image}")
    gold, choices = str(row["answer"]), row.get("choices")
    gold = LETTERS[choices.index(gold)] if choices else gold
    return Question(str(row["pid"]), row["query"], gold, image)
