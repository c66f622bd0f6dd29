"""Questions, hard cuts and what is made of the points."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence.questions import Question, read_questions
from benchmarks.evidence.tradeoff import FEW, Plan, cut
from benchmarks.evidence.tradeoff_table import points_of, summary
from benchmarks.pictures import plot_tradeoff
from tests.support.shown import data_url, part
from tests.support.tiny import tiny_tokenizer
from tests.support.tiny_vision import png

# ---- questions


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("18", "She makes \\boxed{18} dollars.", True),
        ("18", "That is \\boxed{18.00}.", True),
        ("18", "18 eggs at first, so \\boxed{17}.", False),
        ("18", "", False),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\pi/2)}", True),
        ("\\frac{1}{2}", "\\boxed{0.5}", True),
        ("B", "so \\boxed{B}", True),
        ("B", "\\boxed{\\text{(B)}}", True),
        ("B", "The answer is B.", True),
        ("B", "\\boxed{C}", False),
    ],
)
def test_right_answers(gold: str, answer: str, right: bool) -> None:
    assert Question("1", "?", gold).right(answer) == right


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_three_kinds_of_data(tmp_path: Path) -> None:
    shown = png()
    (tmp_path / "1.png").write_bytes(shown)
    found = read_questions(
        write(
            tmp_path / "data.jsonl",
            {"question": "How many?", "answer": "Many.\n#### 1,800"},
            {"problem": "Which?", "answer": "\\pi", "solution": ""},
            {"pid": "7", "query": "Look.", "answer": "yes", "choices": ["no", "yes"]}
            | {"image": "1.png"},
            {"pid": "8", "query": "Count.", "answer": "3", "choices": None, "image": "1.png"},
        )
    )
    assert [q.gold for q in found] == ["1800", "\\pi", "B", "3"]
    assert found[0].content("Be brief.") == "How many?\n\nBe brief."
    picture, text = found[2].content("Be brief.")
    assert picture == part(data_url(shown))
    assert text == {"type": "text", "text": "Look.\n\nBe brief."}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "?", "answer": "5"}, "line 1: answer: no number behind ####"),
        ({"question": "?"}, "line 1: 'answer'"),
        ({"pid": 1, "query": "?", "answer": "1", "image": "no.png"}, "line 1: image: .*no file"),
    ],
)
def test_questions_that_are_none(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_questions(write(tmp_path / "data.jsonl", row))


# ---- points


def test_jobs_are_all_different() -> None:
    plan = Plan(data=Path(), betas=(-1.0, -2.0), budgets=(8, 16), samples=3)
    jobs = plan.jobs([Question("1", "?", "1")])
    assert len({job.key for job in jobs}) == len(jobs) == (1 + 3 + 2 + 2 + 2) * 3


def answer(arm: str, dial: Any, length: int, right: bool, id: str = "1") -> dict[str, Any]:
    ids = list(range(65, 65 + length))
    facts = {"key": f"{arm}/{dial}/{id}", "arm": arm, "dial": dial, "id": id}
    return {
        **facts,
        "ids": ids,
        "length": length,
        "sampled": 2 * length,
        "text": "",
        "right": right,
    }


def test_a_hard_cut_keeps_the_first_tokens() -> None:
    rows = [answer("free", "", 5, True), answer("tilt", -1, 5, True), answer("brief", FEW, 4, True)]
    tokenizer = tiny_tokenizer()
    found = cut(rows, (3, 9), tokenizer)
    assert [r["sampled"] for r in found] == [3, 5, 3, 4]  # a server with that limit stops there
    assert [(r["arm"], r["dial"], r["length"], r["text"]) for r in found] == [
        ("budget", 3, 3, tokenizer.decode([65, 66, 67])),
        ("budget", 9, 5, tokenizer.decode([65, 66, 67, 68, 69])),
        ("few+budget", 3, 3, tokenizer.decode([65, 66, 67])),
        ("few+budget", 9, 4, tokenizer.decode([65, 66, 67, 68])),
    ]
    assert len({r["key"] for r in [*rows, *found]}) == 7


def test_shares_kept_where_the_hard_cut_keeps_a_third(tmp_path: Path) -> None:
    """free: 9 of 10 right with 100 tokens. budget 20: 3 right; 30: 4 right, more than a third."""
    rights = {("free", ""): (100, 9), ("budget", 20): (20, 3), ("budget", 30): (30, 4)}
    rights |= {("tilt", -5): (19, 6), ("tilt", -2): (25, 8), ("brief", "b"): (10, 9)}
    rows = [
        answer(arm, dial, length, i < right, str(i))
        for (arm, dial), (length, right) in rights.items()
        for i in range(10)
    ]
    points = points_of(rows)
    result = summary(points)
    assert result["free"]["accuracy"] == 90.0
    assert (result["budget"], result["budget_tokens"]) == (20, 20.0)
    assert result["hard_kept"] == pytest.approx(1 / 3, abs=1e-3)
    assert result["ours_kept"] == pytest.approx(2 / 3, abs=1e-3)  # not what took 25 tokens
    assert result["chosen_by"] == "accuracy"
    assert result["ours"] == {"arm": "tilt", "dial": -5, "of": 1}
    assert all(p["n"] == p["questions"] == 10 for p in result["points"])
    assert result["free"]["sampled"] == 200.0
    assert len(result["free"]["sampled_ci"]) == 2
    plot_tradeoff(points, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
    older = [{name: value for name, value in p.items() if name != "sampled"} for p in points]
    plot_tradeoff(older, tmp_path / "older.png")
    assert (tmp_path / "older.png").stat().st_size < (tmp_path / "plot.png").stat().st_size
    assert "sampled" not in summary(older)["free"]


def test_nothing_right_leaves_no_share() -> None:
    rows = [answer("free", "", 100, False), answer("budget", 20, 20, False)]
    assert "ours_kept" not in summary(points_of(rows))
