"""The trade-off on questions about pictures, in MathVista's form: from a data set to the JSON line.

The served model is a tiny random Idefics 3, and the value model a random head on it, that sees.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from benchmarks.systems.timing import wait_until
from tests.e2e.pairs import ROOT, Pair
from tests.e2e.test_guided_picture import SECONDS, give, metric
from tests.support.tiny_vision import PLACEHOLDER, png

pytestmark = [pytest.mark.e2e, pytest.mark.pair("seeing")]

PICTURES = {"1": png(20), "2": png(21, 40, 100), "3": png(22, 64, 64)}
ROWS: list[dict[str, Any]] = [
    {"query": "Question: Which?\nChoices:\n(A) no\n(B) yes", "choices": ["no", "yes"]},
    {"query": "Question: How many?", "choices": None},
    {"query": "Question: How long?", "choices": None},
]
ANSWERS = ("yes", "3", "1.2")
ARMS = {("free", ""), ("tilt", -5.0), ("at_most", 8), ("few+at_most", 8)}
ARMS |= {("brief", name) for name in ("brief", "few words", "answer only")}
CUTS = {("budget", 8), ("few+budget", 8)}


def mathvista(folder: Path) -> Path:
    """A data set as the hub has it: pictures in the rows, beside paths that are of no use."""
    text = datasets.Value("string")
    features = {"pid": text, "query": text, "answer": text, "image": text}
    features |= {"choices": datasets.List(text), "decoded_image": datasets.Image()}
    rows = [
        row
        | {"pid": pid, "answer": answer, "image": f"images/{pid}.jpg"}
        | {"decoded_image": {"bytes": file, "path": None}}
        for row, answer, (pid, file) in zip(ROWS, ANSWERS, PICTURES.items(), strict=True)
    ]
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    (folder / "data").mkdir(parents=True)
    data.to_parquet(folder / "data" / "testmini-00000-of-00001.parquet")
    return folder


def tradeoff(pair: Pair, data: Path, output: Path) -> dict[str, Any]:
    """What the command prints as its last line."""
    options = {
        "--data": f"hub:{data}",
        "--hub.split": "testmini",
        "--model": "tiny",
        "--weights": pair.model,
        "--url": f"{pair.url}/v1",
        "--checkpoint": pair.model.parent / "value",
        "--betas": -5,
        "--budgets": 8,
        "--samples": 1,
        "--max-tokens": 24,
        "--concurrency": 4,
        "--output": output,
    }
    given = (f"{name}={value}" for name, value in options.items())
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.evidence.tradeoff", *given],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def test_every_arm_sees_the_pictures(pair: Pair, tmp_path: Path) -> None:
    """Two are there beforehand: a text so short may be over before a third is seen."""
    counters = ("lenvm_rows_total", "lenvm_valued_rows_total")
    held = metric(pair.values, "lenvm_pictures")
    before = [metric(pair.client, name) for name in counters]
    give(pair, PICTURES["1"], PICTURES["2"])
    result = tradeoff(pair, mathvista(tmp_path / "mathvista"), tmp_path / "out")
    wait_until(lambda: metric(pair.values, "lenvm_pictures") == held + len(PICTURES), SECONDS)
    after = [metric(pair.client, name) for name in counters]
    rows, valued = (now - then for now, then in zip(after, before, strict=True))
    assert rows >= valued > rows / 4
    assert metric(pair.client, "lenvm_lost_pictures_total") == 0
    assert metric(pair.client, "lenvm_unseen_requests_total") == 0

    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").open()]
    assert len(answers) == len(ARMS) * len(PICTURES)
    assert {(a["arm"], a["dial"], a["id"]) for a in answers} == {
        (*arm, pid) for arm in ARMS for pid in PICTURES
    }
    places = {(a["id"], a["prompt_ids"].count(PLACEHOLDER)) for a in answers}
    assert len(places) == len(PICTURES)  # as many in every arm
    assert all(count > 0 and count % 4 == 0 for _, count in places)
    assert all(len(a["ids"]) == a["length"] > 0 for a in answers)
    assert all(a["length"] <= 8 for a in answers if a["dial"] == 8)

    assert result["data"] == f"{tmp_path.name}/mathvista"
    assert (result["free"]["n"], result["free"]["questions"]) == (3, 3)
    points = {(p["arm"], p["dial"]): p for p in result["points"]}
    assert points.keys() == ARMS - {("free", "")} | CUTS
    assert all(p["n"] == 3 and 0 <= p["accuracy"] <= 100 for p in points.values())
    assert (tmp_path / "out" / "tradeoff.png").exists()
