"""Which of two texts reads better? Pairs for a judging model, each asked in both orders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.endpoint import Endpoint, Job
from benchmarks.estimates import Sample, estimate
from trainer.rows import Rows

QUESTION = """\
Two writers answered the same request. Which answer is better written: to the point, coherent, \
finished, free of repetition? Do not judge how long they are.

Request:
{request}

Answer A:
{a}

Answer B:
{b}

Reply with one word: A, B or tie."""
POINTS = {"a": 1.0, "b": 0.0}  # of the answer that stands first; anything else is a tie


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Any model behind an OpenAI API; its key comes from OPENAI_API_KEY.

    Parameters
    ----------
    url
        With its /v1.
    model
        As it is served there.
    """

    url: str
    model: str

    def compare(self, rows: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
        """By arm the share, in percent, of comparisons with `prompt` that it wins; a tie is half.

        rows: with their `request`, text and facts. Verdicts of this judge that `folder` holds stay.
        """
        verdicts = Rows(folder / f"verdicts-{Path(self.model).name}.jsonl")
        base = {_place(row): row for row in rows if row["arm"] == "prompt"}
        pairs = [r for r in rows if r["arm"] != "prompt" and _place(r) in base]
        jobs = [_job(row, base[_place(row)], first) for row in pairs for first in (True, False)]
        endpoint = Endpoint(self.url, self.model, with_ids=False)
        answers = endpoint.answer(jobs, verdicts)
        won: dict[str, list[tuple[float, str]]] = {}
        for answer in answers:
            points = POINTS.get(answer["text"].strip().strip("*.\"'").lower(), 0.5)
            points = points if answer["first"] else 1 - points
            won.setdefault(answer["arm"], []).append((100 * points, answer["id"]))
        return {arm: estimate(Sample(*zip(*points, strict=True))) for arm, points in won.items()}


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["mode"], row["target"], row["id"]


def _job(row: dict[str, Any], base: dict[str, Any], first: bool) -> Job:
    """first: whether `row` is A."""
    a, b = (row, base) if first else (base, row)
    question = QUESTION.format(request=row["request"], a=a["text"], b=b["text"])
    facts = {name: row[name] for name in ("arm", "mode", "target", "id")} | {"first": first}
    body = {"temperature": 0.0, "max_tokens": 8}
    return Job(facts, [{"role": "user", "content": question}], body)
