"""Prompts that do not state a length: the four forms of data, and LIFEBench without its clause."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence.ends import Plan, read_prompts, sources_of, without_length
from tests.support.tiny import tiny_tokenizer


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_four_forms_of_data_are_read(tmp_path: Path) -> None:
    file = write(
        tmp_path / "mixed" / "dev.jsonl",
        {"turns": ["Write a poem.", "Again."]},
        {"instruction": "Rewrite it.", "instances": [{"input": "A text.", "output": "?"}]},
        {"question": "How many?", "answer": "#### 4"},
        {"task": "做。字数必须{word_count_type} {word_count}字。", "lang": "cn"},
    )
    prompts = list(read_prompts(file, "mixed"))
    assert [p.text for p in prompts] == [
        "Write a poem.",
        "Rewrite it.\n\nA text.",
        "How many?",
        "做。",
    ]
    assert {p.source for p in prompts} == {"mixed"}
    assert [p.language for p in prompts] == ["en", "en", "en", "cn"]


def test_another_form_names_the_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"question": "?"}, {"text": "?"})
    with pytest.raises(ValueError, match="line 2: none of turns, instruction, question or task"):
        list(read_prompts(file, "a"))


def test_files_of_one_folder_are_data_of_their_own(tmp_path: Path) -> None:
    """Named by the folder alone, their first lines were one prompt, and its answers both's."""
    here = [tmp_path / "here" / name for name in ("question.jsonl", "lifebench.jsonl")]
    for path in here:
        write(path, {"question": f"{path.stem}, one?"}, {"question": f"{path.stem}, two?"})
    there = write(tmp_path / "there" / "dev.jsonl", {"question": "Another?"})
    plan = Plan(data=(*here, there), arms=("single",), targets=(40,), limit=3)
    prompts = plan.prompts(tiny_tokenizer(), seed=0)
    assert [p.source for p in prompts] == ["here-question", "here-lifebench", "there"]
    jobs = list(plan.jobs(prompts))
    assert len({job.key for job in jobs}) == len(jobs) == 3
    with pytest.raises(ValueError, match=r"data: \['here-question', 'here-question'\], must be of"):
        sources_of((here[0], here[0]))


@pytest.mark.parametrize(
    ("task", "left"),
    [
        ("Do it.\n[Requirement] It must be {word_count_type} {word_count} words long.", "Do it."),
        (
            "[Requirement] Expand on it, It must be {word_count_type} {word_count} words long.",
            "[Requirement] Expand on it,",
        ),
        ("完成主体内容，字数必须{word_count_type} {word_count}字。", "完成主体内容，"),  # noqa: RUF001
    ],
)
def test_the_clause_that_says_the_length_goes(task: str, left: str) -> None:
    assert without_length(task) == left


def test_lengths_can_be_words(tmp_path: Path) -> None:
    file = write(tmp_path / "x" / "a.jsonl", {"question": "One?"})
    plan = Plan(data=(file,), arms=("limits", "ramp", "single"), unit="words", targets=(30,))
    (job,) = plan.jobs(list(read_prompts(file, "x")))  # the others are of tokens only
    assert job.body["length_target"] == {"mode": "equal_to", "words": 30, "endings": 1}


def test_every_arm_of_a_prompt_comes_before_the_next(tmp_path: Path) -> None:
    file = write(tmp_path / "x" / "a.jsonl", {"question": "One?"}, {"question": "Two?"})
    plan = Plan(data=(file,), arms=("prompt", "single"), targets=(40, 80))
    jobs = list(plan.jobs(list(read_prompts(file, "x"))))
    assert [job.facts["id"] for job in jobs] == ["x-1"] * 4 + ["x-2"] * 4
    assert [job.facts["arm"] for job in jobs[:2]] == ["prompt", "single"]
    assert "length_target" not in jobs[0].body
    assert jobs[1].body["length_target"] == {"mode": "equal_to", "tokens": 40, "endings": 1}
    assert all("40" not in job.request for job in jobs)
