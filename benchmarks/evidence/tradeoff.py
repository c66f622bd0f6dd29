"""How many tokens does a right answer need? Accuracy against length: GSM8K, MATH500, MathVista.

    python -m benchmarks.evidence.tradeoff --data gsm8k.jsonl --model MODEL --checkpoint CHECKPOINT

free        the model by itself
tilt        length_target of the mode tilt, over beta
at_most     length_target of at most so many tokens
brief       asked in words for a short answer
few+at_most asked for few words, and length_target of at most so many tokens
budget      the free answers cut after so many tokens
few+budget  those to a request for few words, cut

The paper's sampling (T = 1, top_p 1, min_p 0.01). pass@1 is the mean over all samples.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.endpoint import Job
from benchmarks.estimates import Estimate, Sample, estimate
from benchmarks.evidence.arms import check_arms
from benchmarks.evidence.questions import SHAPE, Question, read_questions
from benchmarks.evidence.tasks import stratified
from benchmarks.pictures import plot_tradeoff
from benchmarks.rows import Rows, keep_settings
from benchmarks.servers import digest, endpoint_at
from benchmarks.tables import table
from lenvm_vllm.commands.demo import CHECKPOINT, MODEL
from trainer.checks import check

app = App(help=__doc__)
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.01}
BETAS = (-2.0, -5.0, -10.0, -20.0, -40.0)
BUDGETS = (16, 32, 48, 64, 96, 128, 192, 256, 384)
FEW = "few words"
BRIEF = {
    "brief": f"{SHAPE} Be brief.",
    FEW: f"{SHAPE} Write at most five words for each step.",
    "answer only": "Put the final answer in \\boxed{} and write nothing else.",
}
OURS = ("tilt", "at_most", "few+at_most")
CUTS = {("free", ""): "budget", ("brief", FEW): "few+budget"}  # arm and dial, and what is cut
NAMES, ENDS = ("accuracy", "tokens"), ("low", "high")


def jobs_of(
    questions: Sequence[Question],
    betas: Sequence[float],
    budgets: Sequence[int],
    samples: int,
    max_tokens: int,
) -> list[Job]:
    """Every arm of a question before the next question."""
    arms: list[tuple[str, Any, str, dict[str, Any]]] = [("free", "", SHAPE, {})]
    arms += [("brief", name, text, {}) for name, text in BRIEF.items()]
    for beta in betas:
        arms.append(("tilt", beta, SHAPE, {"length_target": {"mode": "tilt", "beta": beta}}))
    for budget in budgets:
        target = {"mode": "at_most", "tokens": budget}
        arms.append(("at_most", budget, SHAPE, {"length_target": target}))
        arms.append(("few+at_most", budget, BRIEF[FEW], {"length_target": target}))
    jobs = []
    for question in questions:
        for arm, dial, instruction, more in arms:
            message = {"role": "user", "content": question.content(instruction)}
            body = {**SAMPLING, "max_tokens": max_tokens, **more}
            for sample in range(samples):
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
                | {"length": len(ids), "text": tokenizer.decode(ids, skip_special_tokens=True)}
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


def points_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy in percent and mean tokens of each arm and dial."""
    points = []
    for arm, dial in dict.fromkeys((row["arm"], row["dial"]) for row in rows):
        own = [row for row in rows if (row["arm"], row["dial"]) == (arm, dial)]
        groups = [row["id"] for row in own]
        accuracy = estimate(Sample([100.0 * row["right"] for row in own], groups))
        tokens = estimate(Sample([row["length"] for row in own], groups))
        points.append(
            {"arm": arm, "dial": dial, "accuracy": asdict(accuracy), "tokens": asdict(tokens)}
        )
    return points


def summary(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last line. Shares of the free accuracy at the largest budget whose hard cut keeps at
    most a third of it; ours is its best point that needs no more tokens than that cut."""
    flat = [
        {"arm": p["arm"], "dial": p["dial"], "n": p["accuracy"]["n"]}
        | {name: round(p[name]["value"], 2) for name in ("accuracy", "tokens")}
        | {f"{name}_ci": [round(p[name][end], 2) for end in ENDS] for name in NAMES}
        for p in points
    ]
    (free,) = (p for p in flat if p["arm"] == "free")
    result: dict[str, Any] = {"free": free, "points": [p for p in flat if p is not free]}
    poor = [p for p in flat if p["arm"] == "budget" and 3 * p["accuracy"] <= free["accuracy"]]
    if poor and free["accuracy"]:
        hard = max(poor, key=lambda p: p["tokens"])
        ours = [p["accuracy"] for p in flat if p["arm"] in OURS and p["tokens"] <= hard["tokens"]]
        result |= {
            "budget": hard["dial"],
            "budget_tokens": hard["tokens"],
            "hard_kept": round(hard["accuracy"] / free["accuracy"], 3),
            "ours_kept": round(max(ours) / free["accuracy"], 3) if ours else None,
        }
    return result


def point_rows(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of a table for each point."""
    return [
        {"arm": p["arm"], "dial": str(p["dial"])}
        | {"pass@1, %": str(Estimate(**p["accuracy"])), "tokens": str(Estimate(**p["tokens"]))}
        | {"n": p["accuracy"]["n"]}
        for p in points
    ]


@app.default
def main(
    *,
    data: Path,
    model: str = str(MODEL),
    weights: str | None = None,
    url: str | None = None,
    checkpoint: Path = CHECKPOINT,
    betas: tuple[float, ...] = BETAS,
    budgets: tuple[int, ...] = BUDGETS,
    limit: int = 50,
    samples: int = 2,
    max_tokens: int = 512,
    concurrency: int = 32,
    dtype: str | None = None,
    seed: int = 0,
    output: Path = Path("runs/tradeoff"),
    only_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Ask, grade, print a table and, as the last line, one JSON object.

    Parameters
    ----------
    data
        JSON lines of GSM8K, MATH500 or MathVista, the pictures beside them.
    model
        Hub name or folder to serve; with --url the name that it is served under there.
    weights
        Hub name or folder of its tokenizer, where `model` is neither.
    url
        Of a vLLM with the plugin and its value server, with its /v1.
    checkpoint
        Value model to serve; with --url the one that is served there.
    betas
        Of tilt; below 0 shortens.
    budgets
        Tokens of at_most and of the hard cut.
    limit
        Questions. A larger limit goes on from a smaller one.
    samples
        Answers to each question in each arm.
    max_tokens
        That end an answer which does not end.
    concurrency
        Requests at a time.
    dtype
        Of both models; by default what the device multiplies natively.
    seed
        Of the choice of questions, and of the sampling of our own server.
    output
        Folder of the answers, their grades, the figures and the plot.
    only_json
        Print nothing else.
    """
    for name, value in (("limit", limit), ("samples", samples), ("max_tokens", max_tokens)):
        check(value > 0, name, value, "above 0")
    check(all(budget > 0 for budget in budgets), "budgets", budgets, "above 0")
    questions = stratified(read_questions(data), lambda _: 0, limit, seed)
    names = {"data": f"{data.parent.name}/{data.name}", "model": Path(model).name}
    settings = {"value_model": digest(checkpoint), "seed": seed, "max_tokens": max_tokens}
    keep_settings(output, names | settings | SAMPLING)
    jobs = jobs_of(questions, betas, budgets, samples, max_tokens)
    stored = Rows(output / "answers.jsonl")
    if any(job.key not in stored for job in jobs):
        how: dict[str, Any] = {"concurrency": concurrency, "dtype": dtype, "seed": seed}
        with endpoint_at(url, model, checkpoint, output, **how) as endpoint:
            check_arms(("project",), endpoint)
            endpoint.answer(jobs, stored)
    answers = [stored[job.key] for job in jobs]
    answers += cut(answers, budgets, AutoTokenizer.from_pretrained(weights or model))
    points = points_of(grade(answers, questions, Rows(output / "grades.jsonl")))
    result = names | summary(points)
    (output / "figures.json").write_text(json.dumps({"measured": points, **result}) + "\n")
    plot_tradeoff(points, output / "tradeoff.png")
    if not only_json:
        print(table(point_rows(points)))
    print(json.dumps(result))


if __name__ == "__main__":
    app()
