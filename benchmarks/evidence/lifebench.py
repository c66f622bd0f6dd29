"""Does a text get the length that was asked for, and what does that cost the text? LIFEBench.

    python -m benchmarks.evidence.lifebench --data lifebench.jsonl [--unit own] [--url http://host:8000/v1]

The paper's token setting, equal to, at most and at least 32 to 1024 tokens, or LIFEBench's own,
in words; T = 1, top_p 0.999, top_k 15; LD and LS by its Eq. 17 and 18. Without --url it starts
both servers by itself. Every answer is kept in --output: the same command goes on from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclopts import App, Parameter
from transformers import AutoTokenizer

from benchmarks.endpoint import Job
from benchmarks.evidence.answers import Served
from benchmarks.evidence.arms import USUAL, check_arms, job_of
from benchmarks.evidence.judge import Judge
from benchmarks.evidence.lifebench_table import cells, judged, summary, tables
from benchmarks.evidence.likelihood import score_rows
from benchmarks.evidence.measures import MODES
from benchmarks.evidence.tasks import OWN, Task, read_tasks, stratified
from benchmarks.figures import write_figures
from benchmarks.provenance import end
from trainer.checks import check, check_choice, check_positive
from trainer.output import OnlyJson, table
from trainer.resume import keep_settings
from trainer.rows import Rows
from value_server.contract.units import UNITS

app = App(help=__doc__)
SETTINGS = {UNITS[0]: UNITS[0], "own": OWN}  # --unit → the unit that is counted
TARGETS = {UNITS[0]: (32, 64, 128, 256, 512, 1024), OWN: (32, 64, 128, 256, 512)}
SAMPLING = {"temperature": 1.0, "top_p": 0.999, "top_k": 15}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked for, and in which ways."""

    data: Path
    """JSON lines as LIFEBench has them: id, category, lang, task."""
    arms: tuple[str, ...] = USUAL
    """Ways to get the length, some with options as in railed:tolerance=0.05; see
    benchmarks/evidence/arms.py."""
    modes: tuple[str, ...] = MODES
    """equal_to, at_most, at_least."""
    unit: str = UNITS[0]
    """tokens, as in the paper, or own: words, as LIFEBench asks for them, and of Chinese
    characters. The arms limits and ramp are of tokens only."""
    targets: tuple[int, ...] = ()
    """Lengths to ask for; by default 32 to 1024 tokens, or 32 to 512 words."""
    languages: tuple[str, ...] = ("en", "cn")
    """Of the tasks: en, cn."""
    limit: int = 8
    """Tasks, the same number of each kind and language; each is asked for in all modes, targets
    and arms. A larger limit goes on from a smaller one."""
    skip: int = 0
    """Tasks that are left out, the first ones of `limit`: those of a run that chose something."""
    max_prompt: int = 2048
    """Tokens of a task; longer ones are left out."""
    max_tokens: int = 1536
    """That end a text which does not end. A word may take three of them."""

    def check(self) -> None:
        """Raises ValueError naming the option that is wrong."""
        check_positive(limit=self.limit, max_tokens=self.max_tokens)
        check(0 <= self.skip < self.limit, "skip", self.skip, f"0 to {self.limit - 1}")
        for mode in self.modes:
            check_choice("modes", mode, MODES)
        check(all(n > 1 for n in self.targets), "targets", self.targets, "above 1")
        check_choice("unit", self.unit, SETTINGS)
        check_arms(self.arms, self.counted)

    @property
    def counted(self) -> str:
        """The unit of the lengths."""
        return SETTINGS[self.unit]

    def settings(self) -> dict[str, Any]:
        """What shapes the answers; folders of tokens name no unit."""
        unit = {} if self.unit == UNITS[0] else {"unit": self.unit}
        return {**unit, **SAMPLING, "max_tokens": self.max_tokens}

    def tasks(self, tokenizer: Any, seed: int) -> list[Task]:
        """tokenizer: that tells what is too long."""
        tasks = [
            task
            for task in read_tasks(self.data)
            if task.language in self.languages
            and len(tokenizer.encode(task.text)) <= self.max_prompt
        ]
        some = f"some that {self.data} has within max_prompt"
        check(bool(tasks), "languages", self.languages, some)
        kinds = stratified(tasks, lambda task: (task.language, task.kind), self.limit, seed)
        return kinds[self.skip :]

    def jobs(self, tasks: Sequence[Task], tokenizer: Any = None) -> list[Job]:
        """Every arm of a task before the next task: a run that was stopped compares them.

        tokenizer: as of `job_of`.
        """
        jobs, body = [], {**SAMPLING, "max_tokens": self.max_tokens}
        wishes = [(m, n) for m in self.modes for n in self.targets or TARGETS[self.counted]]
        for task in tasks:
            for mode, target in wishes:
                text = task.prompt(mode, target, self.counted)
                for arm in self.arms:
                    names = {"language": task.language, "kind": task.kind, "id": task.id}
                    facts = {"arm": arm, "mode": mode, "target": target, **names}
                    jobs.append(job_of(facts, text, body, self.counted, tokenizer))
        return [job for job in jobs if job]


@app.default
def main(
    *,
    plan: Plan,
    served: Served = Served(),
    quality: bool = True,
    judge: Judge | None = None,
    output: Path = Path("runs/lifebench"),
    only_json: OnlyJson = False,
) -> None:
    """Ask, measure, print tables and, as the last line, one JSON object.

    Parameters
    ----------
    quality
        Also score the answers with the unguided model, for natural ends and perplexity.
    judge
        Model that compares each arm with `prompt`, pair by pair; none by default.
    output
        Folder of the answers, their scores and the figures.
    """
    plan.check()
    tokenizer = AutoTokenizer.from_pretrained(served.files)
    tasks = plan.tasks(tokenizer, served.seed)
    keep_settings(output, served.settings() | plan.settings())
    answers = served.answers(plan.jobs(tasks, tokenizer), output, plan.arms)
    scores: Sequence[Any] = [None] * len(answers)
    if quality:
        scores = score_rows(answers, served.files, Rows(output / "scores.jsonl"))
    rows = [judged(a, score, plan.counted) for a, score in zip(answers, scores, strict=True)]
    found = cells(rows)
    result = {"unit": plan.counted, **summary(found)}
    if judge:
        result["judge"] = judge.compare(rows, output)
    write_figures(output, {"cells": found, **result})
    text = (f"### {caption}\n\n{table(lines)}\n" for caption, lines in tables(found).items())
    end(result, "\n".join(text), only_json)


if __name__ == "__main__":
    app()
