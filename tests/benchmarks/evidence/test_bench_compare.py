"""Arms of two runs side by side: only requests that both have count."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence.compare import main
from benchmarks.figures import write_figures
from tests.support.tiny_llm import tiny_llm
from trainer.resume import keep_settings
from trainer.rows import Rows


def run(folder: Path, arm: str, texts: dict[str, str], nll: float, **other: Any) -> Path:
    """A folder as `ends` leaves it, of texts by task. other: facts that are not the usual ones."""
    answers, scores = Rows(folder / "answers.jsonl"), Rows(folder / "scores.jsonl")
    for task, text in texts.items():
        facts: dict[str, Any] = {"arm": arm, "mode": "equal_to", "target": 20, "id": task}
        facts |= {"language": "en", "kind": "qa", "request": "Do it."}
        facts |= other
        ids = list(text.encode())
        own = {"text": text, "ids": ids, "prompt_ids": [1], "finish": "stop"}
        key = f"{arm}/{task}"
        answers.add({"key": key, **facts, **own, "length": len(ids), "sampled": len(ids)})
        scores.add({"key": key, "nll": nll, "p_end": 0.5})
    answers.close()
    scores.close()
    return folder


def test_only_what_all_have_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "a", "single", {"1": "A whole sentence ok.", "2": "It breaks off he"}, 1.0)
    b = run(tmp_path / "b", "railed", {"1": "It also breaks off a", "3": "Not in the other."}, 2.0)
    main(f"{a}:single", f"{b}:railed", output=tmp_path / "out", only_json=True)
    result = json.loads(capsys.readouterr().out)
    first, second = (result["arms"][f"{name} equal_to"] for name in (f"{a}:single", f"{b}:railed"))
    assert [line["n"] for line in (first, second)] == [1, 1]
    assert first["sentence_share"]["value"] == 100.0
    assert second["sentence_share"]["value"] == 0.0
    assert second["ppl_ratio"]["value"] == pytest.approx(2.718, abs=0.01)
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == result


def test_a_row_for_each_language_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "a", "single", {"1": "A whole sentence ok.", "2": "It breaks off he"}, 1.0)
    main(f"{a}:single", by="language", output=tmp_path / "out", only_json=True)
    arms = json.loads(capsys.readouterr().out)["arms"]
    assert list(arms) == [f"{a}:single equal_to", f"{a}:single equal_to en"]
    with pytest.raises(ValueError, match="by: 'mode', must be one of target, kind, language"):
        main(f"{a}:single", by="mode")


def test_a_second_model_reads_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "a", "single", {"1": "A whole sentence ok.", "2": "It breaks off he"}, 1.0)
    model = str(tiny_llm(tmp_path / "llm"))
    main(f"{a}:single", second=model, output=tmp_path / "out", only_json=True)
    (line,) = json.loads(capsys.readouterr().out)["arms"].values()
    assert line["second_ppl_ratio"]["value"] == 1.0
    # One of the two is a sentence: a model that says the same of both agrees with one of them.
    same = line["second_ends"]["value"] != 50
    assert (line["second_agrees"]["value"] == 50) == same
    assert len(Rows(a / "second-llm.jsonl")) == len(Rows(a / "second-verdicts-llm.jsonl")) == 2


def test_each_second_model_has_opinions_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"1": "A whole sentence ok.", "2": "It breaks off he"}
    a, b = (run(tmp_path / name, "single", texts, 1.0) for name in "ab")
    for model, folder in (("one", a), ("two", a), ("two", b)):
        scores = Rows(folder / f"second-{model}.jsonl")
        verdicts = Rows(folder / f"second-verdicts-{model}.jsonl")
        for task in texts:
            scores.add({"key": f"single/{task}", "nll": 1.0, "p_end": float(model == "two")})
            verdicts.add({"key": f"single/{task}", "ends": model == "two"})
    for name, ends in (("one", 0.0), ("two", 100.0)):  # all is kept, no model reads anything
        model = str(tiny_llm(tmp_path / name))
        main(f"{a}:single", second=model, output=tmp_path / "out", only_json=True)
        (line,) = json.loads(capsys.readouterr().out)["arms"].values()
        assert line["second_ends"]["value"] == line["second_natural"]["value"] == ends


def test_how_the_runs_were_made_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "a", "single", {"1": "A whole sentence ok."}, 1.0)
    b = run(tmp_path / "b", "railed", {"1": "A whole sentence ok."}, 1.0)
    keep_settings(a, {"model": "m", "unit": "own"})
    write_figures(a, {"cells": []})
    arms = (f"{a}:single", f"{b}:railed")
    with pytest.raises(ValueError, match=r"unit: 'tokens', must be words for .*a"):
        main(*arms)
    main(*arms, unit="words", output=tmp_path / "out", only_json=True)
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert runs[str(a)]["settings"] == {"model": "m", "unit": "own"}
    assert runs[str(a)]["provenance"]["machine"]["cores"] >= 1
    assert runs[str(b)] == {}  # it was stopped


def test_only_answers_to_the_same_prompt_are_a_pair(tmp_path: Path) -> None:
    a = run(tmp_path / "a", "single", {"1": "One."}, 1.0)
    b = run(tmp_path / "b", "single", {"1": "One."}, 1.0, request="Do something else.")
    with pytest.raises(ValueError, match="have no request in common"):
        main(f"{a}:single", f"{b}:single")


def test_a_part_that_no_answer_is_of_has_no_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a run that was stopped before its longer texts of one mode."""
    a = run(tmp_path / "a", "single", {"1": "A whole sentence ok."}, 1.0)
    run(a, "single", {"2": "A whole sentence ok."}, 1.0, mode="at_most", target=40)
    main(f"{a}:single", by="target", output=tmp_path / "out", only_json=True)
    named = [
        name.removeprefix(f"{a}:single ") for name in json.loads(capsys.readouterr().out)["arms"]
    ]
    assert named == ["at_most", "equal_to", "at_most 40", "equal_to 20"]


@pytest.mark.parametrize(
    ("arms", "error"),
    [
        (("a:other",), "arms: 'a:other', a has no answers of the arm 'other'"),
        (("a:single", "b:railed"), "have no request in common"),
    ],
)
def test_what_cannot_be_compared_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arms: tuple[str, ...], error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run(Path("a"), "single", {"1": "One."}, 1.0)
    run(Path("b"), "railed", {"2": "Two."}, 1.0)
    with pytest.raises(ValueError, match=error):
        main(*arms)
