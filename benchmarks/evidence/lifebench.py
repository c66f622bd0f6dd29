"""Does a text get the length that was asked for, and what does that cost the text? LIFEBench.

    python -m benchmarks.evidence.lifebench --data lifebench.jsonl [--unit own] [--url http://host:8000/v1]

The paper's token setting, equal to, at most and at least 32 to 1024 tokens, or LIFEBench's own,
in words; T = 1, top_p 0.999, top_k 15; LD and LS by its Eq. 17 and 18. Without --url it starts
both servers by itself. Every answer is kept in --output: the same command goes on from there.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from transformers import AutoTokenizer

from benchmarks.endpoint import Job
from benchmarks.evidence.arms import ARMS, check_arms, fields
from benchmarks.evidence.control import cells, judged, summary, tables
from benchmarks.evidence.judge import Judge
from benchmarks.evidence.lengths import MODES
from benchmarks.evidence.likelihood import score_rows
from benchmarks.evidence.tasks import OWN, Task, read_tasks, stratified
from benchmarks.rows import Rows, keep_settings
from benchmarks.servers import digest, endpoint_at
from benchmarks.tables import table
from lenvm_vllm.commands.demo import CHECKPOINT, MODEL
from trainer.checks import check, check_choice
from value_server.contract.units import UNITS

app = App(help=__doc__)
SETTINGS = {UNITS[0]: UNITS[0], "own": OWN}  # --unit → the unit that is counted
TARGETS = {UNITS[0]: (32, 64, 128, 256, 512, 1024), OWN: (32, 64, 128, 256, 512)}
SAMPLING = {"temperature": 1.0, "top_p": 0.999, "top_k": 15}


def jobs_of(
    tasks: Sequence[Task],
    arms: Sequence[str],
    modes: Sequence[str],
    targets: Sequence[int],
    max_tokens: int,
    unit: str = UNITS[0],
) -> list[Job]:
    """Every arm of a task before the next task, so that a run that was stopped compares them."""
    jobs = []
    for task in tasks:
        for mode in modes:
            for target in targets:
                messages = [{"role": "user", "content": task.prompt(mode, target, unit)}]
                for arm in arms:
                    if (more := fields(arm, mode, target, unit)) is None:
                        continue
                    names = {"language": task.language, "kind": task.kind, "id": task.id}
                    facts = {"arm": arm, "mode": mode, "target": target, **names}
                    body = {**SAMPLING, "max_tokens": max_tokens, **more}
                    jobs.append(Job(facts, messages, body))
    return jobs


@app.default
def main(
    *,
    data: Path,
    model: str = str(MODEL),
    weights: str | None = None,
    url: str | None = None,
    checkpoint: Path = CHECKPOINT,
    arms: tuple[str, ...] = ARMS,
    modes: tuple[str, ...] = MODES,
    unit: str = UNITS[0],
    targets: tuple[int, ...] = (),
    languages: tuple[str, ...] = ("en", "cn"),
    limit: int = 8,
    max_prompt: int = 2048,
    max_tokens: int = 1536,
    concurrency: int = 32,
    dtype: str | None = None,
    quality: bool = True,
    judge: Judge | None = None,
    seed: int = 0,
    output: Path = Path("runs/lifebench"),
    only_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Ask, measure, print tables and, as the last line, one JSON object.

    Parameters
    ----------
    data
        JSON lines as LIFEBench has them: id, category, lang, task.
    model
        Hub name or folder to serve; with --url the name that it is served under there.
    weights
        Hub name or folder of the same model for the perplexities, where `model` is neither.
    url
        Of a vLLM with the plugin and its value server, with its /v1.
    checkpoint
        Value model to serve; with --url the one that is served there.
    arms
        Ways to get the length, some with options as in railed:tolerance=0.05; see
        benchmarks/evidence/arms.py.
    modes
        equal_to, at_most, at_least.
    unit
        tokens, as in the paper, or own: words, as LIFEBench asks for them, and of Chinese
        characters. The arms limits and ramp are of tokens only.
    targets
        Lengths to ask for; by default 32 to 1024 tokens, or 32 to 512 words.
    languages
        Of the tasks: en, cn.
    limit
        Tasks, the same number of each kind and language; each is asked for in all modes,
        targets and arms. A larger limit goes on from a smaller one.
    max_prompt
        Tokens of a task; longer ones are left out.
    max_tokens
        That end a text which does not end. A word may take three of them.
    concurrency
        Requests at a time.
    dtype
        Of both models; by default what the device multiplies natively.
    quality
        Also score the answers with the unguided model, for natural ends and perplexity.
    judge
        Model that compares each arm with `prompt`, pair by pair; none by default.
    seed
        Of the choice of tasks, and of the sampling of our own server.
    output
        Folder of the answers, their scores and the figures.
    only_json
        Print nothing else.
    """
    for name, value in (("limit", limit), ("max_tokens", max_tokens), ("concurrency", concurrency)):
        check(value > 0, name, value, "above 0")
    for mode in modes:
        check_choice("modes", mode, MODES)
    check(all(n > 1 for n in targets), "targets", targets, "above 1")
    check_choice("unit", unit, SETTINGS)
    counted = SETTINGS[unit]
    targets = targets or TARGETS[counted]
    tokenizer = AutoTokenizer.from_pretrained(weights or model)
    tasks = [
        task
        for task in read_tasks(data)
        if task.language in languages and len(tokenizer.encode(task.text)) <= max_prompt
    ]
    check(bool(tasks), "languages", languages, f"some that {data} has within max_prompt")
    chosen = stratified(tasks, lambda task: (task.language, task.kind), limit, seed)
    settings = {"model": Path(model).name, "value_model": digest(checkpoint), "seed": seed}
    settings |= {} if unit == UNITS[0] else {"unit": unit}  # folders of tokens name none
    keep_settings(output, {**settings, **SAMPLING, "max_tokens": max_tokens})
    jobs = jobs_of(chosen, arms, modes, targets, max_tokens, counted)
    stored = Rows(output / "answers.jsonl")
    if all(job.key in stored for job in jobs):
        answers = [stored[job.key] for job in jobs]
    else:
        how: dict[str, Any] = {"concurrency": concurrency, "dtype": dtype, "seed": seed}
        with endpoint_at(url, model, checkpoint, output, **how) as endpoint:
            check_arms(arms, endpoint, counted)
            answers = endpoint.answer(jobs, stored)
    scores: Sequence[Any] = [None] * len(answers)
    if quality:
        scores = score_rows(answers, weights or model, Rows(output / "scores.jsonl"))
    rows = [judged(a, score, counted) for a, score in zip(answers, scores, strict=True)]
    found = cells(rows)
    result = {"unit": counted, **summary(found)}
    if judge:
        result["judge"] = judge.compare(rows, Rows(output / "verdicts.jsonl"))
    (output / "figures.json").write_text(json.dumps({"cells": found, **result}) + "\n")
    if not only_json:
        for caption, lines in tables(found).items():
            print(f"### {caption}\n\n{table(lines)}\n")
    print(json.dumps(result))


if __name__ == "__main__":
    app()
