"""Questions of OpenCodeReasoning-2: its rows name a row of another data set instead."""

from collections.abc import Mapping
from functools import cache
from typing import Any

# name in a row -> (hub data set, branch). Two are kept by a script, which only the hub's own
# conversion spares us.
SOURCES = {
    "taco": ("BAAI/TACO", "refs/convert/parquet"),
    "apps": ("codeparrot/apps", "refs/convert/parquet"),
    "code_contests": ("deepmind/code_contests", "main"),
    "open-r1/codeforces": ("open-r1/codeforces", "main"),
}


@cache
def _source(name: str, split: str) -> Any:
    from datasets import load_dataset

    data, revision = SOURCES[name]
    return load_dataset(data, split=split, revision=revision)


def question_of(row: Mapping[str, Any]) -> str | None:
    """The question itself, or that of the row meant; None where it is not told."""
    if row["question"] not in ("", "-", None):
        return str(row["question"])
    if row["dataset"] not in SOURCES:
        return None
    origin = _source(row["dataset"], row["split"])[int(row["index"])]
    return origin.get("question") or _assembled(origin)


def _assembled(problem: Mapping[str, Any]) -> str | None:
    """A statement with its formats, examples and note under headings."""
    if not problem.get("description"):
        return None
    parts = [problem["description"]]
    for name in ("input_format", "output_format"):
        if problem.get(name):
            parts += [name.removesuffix("_format").capitalize(), problem[name]]
    for example in problem.get("examples") or []:
        parts += ["Example input", example["input"], "Example output", example["output"]]
    if problem.get("note"):
        parts += ["Note", problem["note"]]
    return "\n\n".join(parts)
