"""Arms of two runs side by side: only requests that both have count."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence.compare import main
from tests.support.tiny_llm import tiny_llm
from trainer.rows import Rows


def run(folder: Path, arm: str, texts: dict[str, str], nll: float) -> Path:
    """A folder as `ends` leaves it, of texts by task."""
    answers, scores = Rows(folder / "answers.jsonl"), Rows(folder / "scores.jsonl")
    for task, text in texts.items():
        facts: dict[str, Any] = {"arm": arm, "mode": "equal_to", "target": 20, "id": task}
        facts |= {"language": "en", "kind": "qa", "request": "Do it."}
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
    assert len(Rows(a / "second.jsonl")) == len(Rows(a / "second_verdicts.jsonl")) == 2


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
