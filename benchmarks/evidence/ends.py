"""How do texts end whose prompt does not say how long they should be?

    python -m benchmarks.evidence.ends --data question.jsonl --data lifebench.jsonl

Only the field `length_target` asks for a length, and the rule of the arm countdown. The prompts
are those of MT-bench, self-instruct, GSM8K, or LIFEBench without the sentence that tells the
length; T = 1, top_p 0.999, top_k 15. --url http://host:8000/v1 asks a vLLM that runs already.
Perplexities are under the served model, over those of texts that it wrote without any target (the
arm prompt). Every answer is kept in --output: the same command goes on from there.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclopts import App, Parameter
from transformers import AutoTokenizer

from benchmarks.endpoint import Job
from benchmarks.evidence.answers import Served
from benchmarks.evidence.arms import check_arms, job_of
from benchmarks.evidence.lifebench_table import cells, judged, summary, tables
from benchmarks.evidence.likelihood import score_rows
from benchmarks.evidence.measures import MODES
from benchmarks.evidence.tasks import stratified
from benchmarks.figures import write_figures
from benchmarks.provenance import end
from trainer.checks import check, check_choice, check_positive
from trainer.output import OnlyJson, table
from trainer.resume import keep_settings
from trainer.rows import Rows, read_rows
from value_server.contract.units import UNITS

app = App(help=__doc__)
SAMPLING = {"temperature": 1.0, "top_p": 0.999, "top_k": 15}
# What says the length: the clause of LIFEBench with both of its blanks.
LENGTH = re.compile(
    r"[^,.!?\n\]，。！？]*\{word_count_type\}[^.!?\n。！？]*\{word_count\}[^.!?\n。！？]*[.!?。！？]?"  # noqa: RUF001
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """source: see `sources_of`."""

    id: str
    source: str
    language: str
    text: str


def sources_of(paths: Sequence[Path]) -> list[str]:
    """What names the data of each file: its folder, and its own name where others share that.

    Raises ValueError where two are named alike: a prompt's id is its source and line.
    """
    folders = [path.resolve().parent.name for path in paths]
    alone = [folders.count(folder) == 1 for folder in folders]
    both = zip(folders, paths, alone, strict=True)
    names = [folder if one else f"{folder}-{path.stem}" for folder, path, one in both]
    check(len({*names}) == len(paths), "data", names, "of different names")
    return names


def read_prompts(path: Path, source: str) -> Iterator[Prompt]:
    """Of JSON lines in any of the four forms. Raises ValueError naming the line."""
    for number, row in enumerate(read_rows(path), 1):
        text = _text(row)
        if text is None:
            known = "turns, instruction, question or task"
            raise ValueError(f"{path}: line {number}: none of {known}")
        yield Prompt(f"{source}-{number}", source, row.get("lang", "en"), text)


def _text(row: Mapping[str, Any]) -> str | None:
    if "turns" in row:
        return str(row["turns"][0])
    if "instruction" in row:
        given = row["instances"][0]["input"] if row.get("instances") else ""
        return f"{row['instruction']}\n\n{given}".strip()
    if "question" in row:
        return str(row["question"])
    return without_length(row["task"]) if "task" in row else None


def without_length(task: str) -> str:
    """A task of LIFEBench, less the clause that says its length."""
    return LENGTH.sub("", task).strip().removesuffix("[Requirement]").removesuffix("[要求]").strip()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked for, and in which ways."""

    data: tuple[Path, ...]
    """JSON lines as MT-bench (turns), self-instruct (instruction), GSM8K (question) or LIFEBench
    (task) have them."""
    arms: tuple[str, ...] = ("prompt", "limits", "ramp", "countdown", "single", "railed")
    """Ways to get the length, see benchmarks/evidence/arms.py; prompt is no target at all."""
    modes: tuple[str, ...] = ("equal_to",)
    """equal_to, at_most, at_least."""
    unit: str = UNITS[0]
    """Of the targets: tokens, words or characters. The arms limits and ramp are of tokens only."""
    targets: tuple[int, ...] = (40, 80, 160, 320, 640)
    """Lengths to ask for."""
    limit: int = 24
    """Prompts, the same number of each file and language."""
    skip: int = 0
    """Prompts that are left out, the first ones of `limit`: those of a run that chose something."""
    max_prompt: int = 1024
    """Tokens of a prompt; longer ones are left out."""
    max_tokens: int = 1024
    """That end a text which does not end."""

    def check(self) -> None:
        """Raises ValueError naming the option that is wrong."""
        check_positive(limit=self.limit, max_tokens=self.max_tokens)
        check(0 <= self.skip < self.limit, "skip", self.skip, f"0 to {self.limit - 1}")
        for mode in self.modes:
            check_choice("modes", mode, MODES)
        check_choice("unit", self.unit, UNITS)
        check_arms(self.arms, self.unit)
        check(all(n > 1 for n in self.targets), "targets", self.targets, "above 1")

    def prompts(self, tokenizer: Any, seed: int) -> list[Prompt]:
        """tokenizer: that tells what is too long."""
        fit = [
            prompt
            for path, source in zip(self.data, sources_of(self.data), strict=True)
            for prompt in read_prompts(path, source)
            if len(tokenizer.encode(prompt.text)) <= self.max_prompt
        ]
        kinds = stratified(fit, lambda prompt: (prompt.source, prompt.language), self.limit, seed)
        return kinds[self.skip :]

    def jobs(self, prompts: Sequence[Prompt], tokenizer: Any = None) -> Iterator[Job]:
        """Every arm of a prompt before the next: a run that was stopped compares them.

        tokenizer: as of `job_of`.
        """
        body = {**SAMPLING, "max_tokens": self.max_tokens}
        for prompt in prompts:
            for mode, target in ((m, n) for m in self.modes for n in self.targets):
                for arm in self.arms:
                    names = {"language": prompt.language, "kind": prompt.source, "id": prompt.id}
                    facts = {"arm": arm, "mode": mode, "target": target, **names}
                    if job := job_of(facts, prompt.text, body, self.unit, tokenizer):
                        yield job


@app.default
def main(
    *,
    plan: Plan,
    served: Served = Served(),
    output: Path = Path("runs/ends"),
    only_json: OnlyJson = False,
) -> None:
    """Ask, measure, print tables and, as the last line, one JSON object.

    Parameters
    ----------
    output
        Folder of the answers, their scores and the figures.
    """
    plan.check()
    tokenizer = AutoTokenizer.from_pretrained(served.files)
    prompts = plan.prompts(tokenizer, served.seed)
    unit = {} if plan.unit == UNITS[0] else {"unit": plan.unit}
    shape = {**unit, **SAMPLING, "max_tokens": plan.max_tokens, "stated": False}
    keep_settings(output, served.settings() | shape)
    answers = served.answers(list(plan.jobs(prompts, tokenizer)), output, plan.arms)
    scores = score_rows(answers, served.files, Rows(output / "scores.jsonl"))
    rows = [judged(a, score, plan.unit) for a, score in zip(answers, scores, strict=True)]
    found = cells(rows)
    result = {"unit": plan.unit, **summary(found)}
    write_figures(output, {"cells": found, **result})
    text = (f"### {caption}\n\n{table(lines)}\n" for caption, lines in tables(found).items())
    end(result, "\n".join(text), only_json)


if __name__ == "__main__":
    app()
