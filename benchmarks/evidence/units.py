"""How well do words and characters follow from tokens, as `/v1/predict` tells them?

    python -m benchmarks.evidence.units --rollouts rollouts.parquet \\
        --answers runs/lifebench/answers.jsonl

Of each answer the number of its tokens is taken as known, and its words and characters are told
from it and the prompt, as the value server does: what is wrong then is the conversion's error
alone. Beside it the prior's, and how LIFEBench would count the words.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from cyclopts import App
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.provenance import end
from lenvm_vllm.commands.demo import MODEL
from trainer.checks import check
from trainer.output import OnlyJson, table
from trainer.rows import read_rows
from value_server.contract.units import CHARACTERS, PRIOR, WORDS, count
from value_server.http.text import TextRequest, Texts

app = App(help=__doc__)
# LIFEBench: ideographs, and runs of Latin letters, digits, apostrophes and hyphens.
_LIFEBENCH = re.compile(r"[\u4e00-\u9fff]|\b[A-Za-z0-9'-]+\b")


@dataclass(frozen=True, slots=True)
class Answer:
    """kind: of the prompt. tokens: end-of-sequence included."""

    kind: str
    prompt: str
    text: str
    tokens: int


def of_rollouts(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Answer]:
    """Answers of a Parquet file as `lenvm rollout` writes it, by domain."""
    columns = ["domain", "prompt", "completion_ids", "finish_reason"]
    for row in pq.read_table(path, columns=columns).to_pylist():
        text = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        tokens = len(row["completion_ids"]) + (row["finish_reason"] != "stop")
        yield Answer(row["domain"], row["prompt"], str(text), tokens)


def of_lifebench(path: Path) -> Iterator[Answer]:
    """The answers that `benchmarks.evidence.lifebench` keeps, by language."""
    for row in read_rows(path):
        tokens = row["length"] + (row["finish"] != "stop")
        yield Answer(f"lifebench {row['language']}", row["request"], row["text"], tokens)


def figures_of(answers: Sequence[Answer], texts: Texts) -> dict[str, Any]:
    """Median tokens a unit, and errors in percent: median and 90th percentile of what the prompt
    tells, median of what the prior tells. n: answers with a word in them."""
    known = [answer for answer in answers if count(answer.text, WORDS)]
    lifebench = [len(_LIFEBENCH.findall(a.text)) / count(a.text, WORDS) for a in known]
    figures: dict[str, Any] = {"n": len(known), "lifebench_ratio": float(np.median(lifebench))}
    told = [texts.prediction(TextRequest(prompt=a.prompt), a.tokens).model_dump() for a in known]
    for unit in (WORDS, CHARACTERS):
        tokens = np.array([answer.tokens - 1 for answer in known])
        truth = np.array([count(answer.text, unit) for answer in known])
        errors = np.abs([one[f"predicted_{unit}"] for one in told] / truth - 1)
        figures[unit] = {
            "tokens_each": float(np.median(tokens / truth)),
            "error": float(100 * np.median(errors)),
            "error_p90": float(100 * np.percentile(errors, 90)),
            "prior_error": float(100 * np.median(np.abs(tokens / PRIOR[unit] / truth - 1))),
        }
    return figures


def rows_of(figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of a table for each kind and unit."""
    return [
        {"prompts": kind, "unit": unit, **own[unit], "n": own["n"]}
        for kind, own in figures.items()
        for unit in (WORDS, CHARACTERS)
    ]


@app.default
def main(
    *,
    rollouts: Path | None = None,
    answers: Path | None = None,
    model: str = str(MODEL),
    only_json: OnlyJson = False,
) -> None:
    """Count, print a table and, as the last line, one JSON object.

    Parameters
    ----------
    rollouts
        Parquet file of `lenvm rollout`, by domain.
    answers
        answers.jsonl of `benchmarks.evidence.lifebench`, by language.
    model
        Hub name or folder of the model that wrote them.
    """
    check(bool(rollouts or answers), "rollouts", rollouts, "given, or answers")
    tokenizer = AutoTokenizer.from_pretrained(model)
    by_kind: dict[str, list[Answer]] = defaultdict(list)
    for path, read in ((rollouts, lambda p: of_rollouts(p, tokenizer)), (answers, of_lifebench)):
        for answer in read(path) if path else ():
            by_kind[answer.kind].append(answer)
    figures = {kind: figures_of(own, Texts(tokenizer)) for kind, own in by_kind.items()}
    end(figures, table(rows_of(figures)), only_json)


if __name__ == "__main__":
    app()
