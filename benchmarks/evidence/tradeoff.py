"""How many tokens does a right answer need? Accuracy against length: GSM8K, MATH500, MathVista.

    python -m benchmarks.evidence.tradeoff --data gsm8k.jsonl --model MODEL --checkpoint CHECKPOINT
    python -m benchmarks.evidence.tradeoff --data hub:AI4Math/MathVista --hub.split testmini ...

free        the model by itself
tilt        length_target of the mode tilt, over beta
at_most     length_target of at most so many tokens
brief       asked in words for a short answer
few+at_most asked for few words, and length_target of at most so many tokens
budget      the free answers cut after so many tokens
few+budget  those to a request for few words, cut

The paper's sampling (T = 1, top_p 1, min_p 0.01). pass@1 is the mean over all samples.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cyclopts import App, Parameter
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.endpoint import Job
from benchmarks.evidence.answers import Served
from benchmarks.evidence.questions import SHAPE, Question, read_questions
from benchmarks.evidence.tasks import stratified
from benchmarks.evidence.tradeoff_table import points_of, summary, table_rows
from benchmarks.figures import write_figures
from benchmarks.pictures import plot_tradeoff
from benchmarks.provenance import end
from trainer.checks import check, check_positive
from trainer.output import OnlyJson, table
from trainer.resume import keep_settings
from trainer.rollouts.prompts import HUB, Hub
from trainer.rows import Rows

app = App(help=__doc__)
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.01}
FEW = "few words"
BRIEF = {
    "brief": f"{SHAPE} Be brief.",
    FEW: f"{SHAPE} Write at most five words for each step.",
    "answer only": "Put the final answer in \\boxed{} and write nothing else.",
}
CUTS = {("free", ""): "budget", ("brief", FEW): "few+budget"}  # arm and dial, and what is cut


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked, and in which ways."""

    data: Path
    """JSON lines of GSM8K, MATH500 or MathVista, the pictures beside them, or the data set
    hub:NAME."""
    hub: Hub = Hub()
    betas: tuple[float, ...] = (-2.0, -5.0, -10.0, -20.0, -40.0)
    """Of tilt; below 0 shortens."""
    budgets: tuple[int, ...] = (16, 32, 48, 64, 96, 128, 192, 256, 384)
    """Tokens of at_most and of the hard cut."""
    cuts: tuple[int, ...] = ()
    """Tokens of more hard cuts, which ask for no answer."""
    limit: int = 50
    """Questions. A larger limit goes on from a smaller one."""
    samples: int = 2
    """Answers to each question in each arm."""
    max_tokens: int = 512
    """That end an answer which does not end."""

    def check(self) -> None:
        """Raises ValueError naming the option that is wrong."""
        check_positive(limit=self.limit, samples=self.samples, max_tokens=self.max_tokens)
        for name, budgets in (("budgets", self.budgets), ("cuts", self.cuts)):
            check(all(budget > 0 for budget in budgets), name, budgets, "above 0")

    def settings(self) -> dict[str, Any]:
        """What shapes the answers."""
        data = f"{self.data.parent.name}/{self.data.name}"
        of_hub = asdict(self.hub) if str(self.data).startswith(HUB) else {}
        return {"data": data, **of_hub, "max_tokens": self.max_tokens, **SAMPLING}

    def arms(self) -> Iterator[tuple[str, Any, str, dict[str, Any]]]:
        """(arm, dial, instruction, fields of the request)."""
        yield "free", "", SHAPE, {}
        for name, text in BRIEF.items():
            yield "brief", name, text, {}
        for beta in self.betas:
            yield "tilt", beta, SHAPE, {"length_target": {"mode": "tilt", "beta": beta}}
        for budget in self.budgets:
            target = {"length_target": {"mode": "at_most", "tokens": budget}}
            yield "at_most", budget, SHAPE, target
            yield "few+at_most", budget, BRIEF[FEW], target

    def jobs(self, questions: Sequence[Question]) -> list[Job]:
        """Every arm of a question before the next question."""
        jobs = []
        for question in questions:
            for arm, dial, instruction, more in self.arms():
                message = {"role": "user", "content": question.content(instruction)}
                body = {**SAMPLING, "max_tokens": self.max_tokens, **more}
                for sample in range(self.samples):
                    facts = {"arm": arm, "dial": dial, "id": question.id, "sample": sample}
                    jobs.append(Job(facts, [message], body))
        return jobs


def cut(
    answers: Sequence[dict[str, Any]], budgets: Sequence[int], tokenizer: Any
) -> list[dict[str, Any]]:
    """The arms of CUTS: answers after at most so many tokens."""
    rows = []
    for answer in answers:
        arm = CUTS.get((answer["arm"], answer["dial"]))
        for budget in budgets if arm else ():
            ids = answer["ids"][:budget]
            rows.append(
                answer
                | {"key": f"{answer['key']}@{budget}", "arm": arm, "dial": budget}
                | {"length": len(ids), "sampled": len(ids)}  # as a server with that limit does
                | {"text": tokenizer.decode(ids, skip_special_tokens=True)}
            )
    return rows


def grade(
    answers: Sequence[dict[str, Any]], questions: Sequence[Question], grades: Rows
) -> list[dict[str, Any]]:
    """The answers with `right`; grades that are there already stay."""
    by_id = {question.id: question for question in questions}
    for answer in tqdm(answers, desc="grades", file=sys.stderr):
        if answer["key"] not in grades:
            right = by_id[answer["id"]].right(answer["text"])
            grades.add({"key": answer["key"], "right": right})
    return [answer | {"right": grades[answer["key"]]["right"]} for answer in answers]


@app.default
def main(
    *,
    plan: Plan,
    served: Served = Served(),
    output: Path = Path("runs/tradeoff"),
    only_json: OnlyJson = False,
) -> None:
    """Ask, grade, print a table and, as the last line, one JSON object.

    Parameters
    ----------
    output
        Folder of the answers, their grades, the figures and the plot.
    """
    plan.check()
    found = read_questions(plan.data, plan.hub)
    questions = stratified(found, lambda _: 0, plan.limit, served.seed)
    settings = served.settings() | plan.settings()
    keep_settings(output, settings)
    answers = served.answers(plan.jobs(questions), output, arms=("project",))
    cuts = sorted({*plan.budgets, *plan.cuts})
    answers += cut(answers, cuts, AutoTokenizer.from_pretrained(served.files))
    points = points_of(grade(answers, questions, Rows(output / "grades.jsonl")))
    result = {"data": settings["data"], "model": settings["model"], **summary(points)}
    write_figures(output, {"measured": points, **result})
    plot_tradeoff(points, output / "tradeoff.png")
    end(result, table(table_rows(points)), only_json)


if __name__ == "__main__":
    app()
